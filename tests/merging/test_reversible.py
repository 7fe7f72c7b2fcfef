"""Reversible merging: a few basis models, from which each model comes back by its name."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from isotune.checkpoint.paired_files import write_sealed
from isotune.errors import CheckpointError, OptionError
from isotune.linalg.low_rank import Factored, norm, weighted_sum
from isotune.merging.reversible.compress import compress
from isotune.merging.reversible.stored import Reversible
from support import files

Models = dict[str, dict[str, Factored]]
SHAPES = {"a": (40, 30), "b": (24, 36)}
GRANULARITIES = ["position", "layer"]


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


def alike(count: int = 6, rank: int = 4, noise: float = 0.1, dtype: torch.dtype = torch.float64) -> Models:
    """Models that share much of what they are, each in a gauge of its own."""
    common = {path: (drawn(m, rank), drawn(rank, n)) for path, (m, n) in SHAPES.items()}
    models: Models = {}
    for i in range(count):
        models[f"m{i}"] = {}
        for path, (B, A) in common.items():
            own = Factored(B + noise * drawn(*B.shape), A + noise * drawn(*A.shape))
            models[f"m{i}"][path] = Factored(*(t.to(dtype) for t in gauged(own)))
    return models


def gauged(change: Factored) -> Factored:
    """The same change in another gauge."""
    G = drawn(change.rank, change.rank)
    return Factored(change.B @ G, torch.linalg.inv(G) @ change.A)


def relative(found: Factored, expected: Factored) -> float:
    """`|found - expected| / |expected|`, densely."""
    return float((found.dense() - expected.dense()).norm() / expected.dense().norm())


def assert_as_told(found: Reversible, models: Models, tolerance: float = 1e-7) -> None:
    """Everything comes back, with the error that is told."""
    assert found.names == tuple(models)
    for name, changes in models.items():
        recovered = found.recover(name)
        assert set(recovered) == set(changes) == set(found.errors[name])
        for path, change in changes.items():
            assert recovered[path].shape == change.shape
            error = found.errors[name][path]
            assert relative(recovered[path], change) == pytest.approx(error.change, rel=1e-6, abs=tolerance)


@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_error_is_what_is_told_and_what_the_singular_values_left_out_predict(
    granularity: Any, center: bool, align: bool
) -> None:
    models = alike()
    found = compress(models, basis=2, granularity=granularity, center=center, align=align)
    assert_as_told(found, models)
    for of in found.errors.values():
        for error in of.values():
            assert error.factors == pytest.approx(error.predicted, rel=1e-9)
            assert error.change > 0
    assert found.error == max(error.change for of in found.errors.values() for error in of.values())


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_larger_basis_errs_less_and_the_full_one_not_at_all(granularity: Any) -> None:
    models = alike(count=12, rank=8, noise=0.5)
    errors = [compress(models, basis=p, granularity=granularity) for p in (1, 2, 3, 4)]
    for fewer, more in itertools.pairwise(errors):
        assert more.values > fewer.values
        for name in models:
            for path in SHAPES:
                assert more.errors[name][path].factors < fewer.errors[name][path].factors
    full = compress(models, basis=100, granularity=granularity)
    assert full.error < 1e-12
    assert all(relative(full.recover(name)[path], models[name][path]) < 1e-12 for name in models for path in SHAPES)


def test_the_error_of_a_change_is_bounded_by_that_of_its_factors() -> None:
    models = alike(noise=0.3)
    found = compress(models)
    for name, changes in models.items():
        for path, change in changes.items():
            S = torch.linalg.svdvals(change.dense())
            wrong = found.errors[name][path].factors * float(2 * S.sum()) ** 0.5
            bound = 2**0.5 * float(S[0]) ** 0.5 * wrong + wrong**2 / 2
            assert found.errors[name][path].change * norm(change) <= bound


def test_the_gauge_of_the_factors_does_not_matter() -> None:
    models = alike(noise=0.3)
    turned = {name: {path: gauged(change) for path, change in of.items()} for name, of in models.items()}
    one, other = compress(models), compress(turned)
    for name in models:
        for path in SHAPES:
            assert other.errors[name][path].change == pytest.approx(one.errors[name][path].change, rel=1e-6)
            torch.testing.assert_close(other.recover(name)[path].dense(), one.recover(name)[path].dense())
    assert compress(turned, align=False).error > 3 * one.error


def test_the_order_of_the_models_does_not_matter() -> None:
    models = alike(noise=0.3)
    one, other = compress(models), compress(dict(reversed(models.items())))
    for name in models:
        torch.testing.assert_close(other.recover(name)["a"].dense(), one.recover(name)["a"].dense())


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_models_that_are_the_same_need_one_basis_model(granularity: Any) -> None:
    (one,) = alike(count=1).values()
    models = {name: {path: gauged(change) for path, change in one.items()} for name in "xyz"}
    found = compress(models, basis=1, granularity=granularity)
    assert {site.basis for site in found.sites.values()} == {1}
    assert found.error < 1e-12
    assert_as_told(found, models)


@pytest.mark.parametrize("center", [True, False])
def test_storage_is_counted(center: bool) -> None:
    count, r, p = 8, 16, 2
    models = alike(count, r)
    found = compress(models, basis=p, center=center)
    sides = sum(m + n for m, n in SHAPES.values())
    assert found.separate_values == sides * r * count
    assert found.values == sides * (p * r + (p - center) * count)
    if not center:
        assert found.values / found.separate_values == p * (r + count) / (r * count)
    layered = compress(models, basis=p, center=center, granularity="layer")
    assert layered.values == sides * p * r + 2 * len(SHAPES) * (p - center) * count
    for folder in (found, layered):
        assert folder.values == sum(t.numel() for site in folder.sites.values() for t in site.tensors.values())


def test_the_mean_model_alone_is_a_basis_of_one() -> None:
    models = alike(noise=0.01)
    found = compress(models, basis=1, center=True)
    first = found.recover("m0")
    for name in models:
        for path, change in found.recover(name).items():
            assert change.dense().equal(first[path].dense())
    assert_as_told(found, models)
    assert found.error < 0.1


def test_what_saves_nothing_is_kept_as_it_is_bit_for_bit() -> None:
    models = alike(count=3, rank=4)
    found = compress(models, basis=2)  # 2 (4 + 3) numbers for each row in place of 12
    assert {site.basis for site in found.sites.values()} == {None}
    assert found.values == found.separate_values
    assert found.error == 0
    for name, changes in models.items():
        for path, change in changes.items():
            assert found.recover(name)[path].B.equal(change.B)
            assert found.recover(name)[path].A.equal(change.A)
    assert compress(models, basis=1).values < found.values


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_tolerance_takes_the_smallest_basis_that_keeps_it(granularity: Any) -> None:
    models = alike(count=12, rank=8, noise=0.1)
    for path, change in alike(count=12, rank=8, noise=3.0)["m3"].items():
        models["m3"][path] = change  # one that is like no other
    sizes = []
    for tolerance in (0.9, 0.3, 0.1):
        found = compress(models, tolerance=tolerance, granularity=granularity)
        assert found.error <= tolerance
        assert_as_told(found, models)
        for path, site in found.sites.items():
            size = site.basis or 1
            smaller = compress(models, basis=size - 1, granularity=granularity) if size > 1 else None
            assert smaller is None or max(smaller.errors[n][path].change for n in models) > tolerance
        sizes.append(found.values)
    assert sizes == sorted(sizes)
    assert compress(models, tolerance=0.0).values == compress(models, tolerance=0.0).separate_values


def test_ranks_and_layers_may_differ() -> None:
    models = alike(count=6, rank=6)
    models["m1"] = {"a": Factored(models["m1"]["a"].B[:, :2], models["m1"]["a"].A[:2])}
    models["m2"]["c"] = Factored(drawn(7, 2), drawn(2, 5))
    # Exported with zeros up to a common rank, and trained for no step:
    wide = models["m3"]["b"]
    models["m3"]["b"] = Factored(torch.cat([wide.B, 0 * wide.B], dim=1), torch.cat([wide.A, wide.A]))
    models["m4"]["b"] = Factored(torch.zeros(24, 3).double(), drawn(3, 36))
    models["m5"]["a"] = Factored(drawn(40, 0), drawn(0, 30))
    for align in (True, False):
        for center in (True, False):
            found = compress(models, basis=2, align=align, center=center)
            ranks = {name: {path: change.rank for path, change in found.recover(name).items()} for name in models}
            assert ranks["m1"] == {"a": 2}
            assert ranks["m2"] == {"a": 6, "b": 6, "c": 2}
            assert ranks["m5"] == {"a": 0, "b": 6}
            assert found.sites["c"].basis is None
            assert found.sites["a"].basis == 2
            if align:
                assert ranks["m3"] == {"a": 6, "b": 6}
                assert ranks["m4"] == {"a": 6, "b": 0}
                zero = found.errors["m4"].pop("b")
                assert (zero.change, zero.factors, zero.predicted) == (0, 0, 0)
                assert found.recover("m4")["b"].dense().abs().sum() == 0
                for name in ("m0", "m1", "m2", "m3"):
                    for path, change in models[name].items():
                        error = found.errors[name][path]
                        assert error.factors <= error.predicted * (1 + 1e-9)
                        assert relative(found.recover(name)[path], change) == pytest.approx(error.change, rel=1e-6)


def test_changes_whose_factors_are_mixtures_of_three_need_three() -> None:
    Bs, As = drawn(3, 40, 6), drawn(3, 6, 30)
    models = {
        f"m{i}": {"a": Factored(torch.tensordot(drawn(3), Bs, 1), torch.tensordot(drawn(3), As, 1))}
        for i in range(10)
    }
    found = compress(models, tolerance=1e-10, align=False)
    assert found.sites["a"].basis == 3
    assert found.error < 1e-12
    assert_as_told(found, models)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    models = alike(dtype=dtype)
    found = compress(models)
    assert {change.B.dtype for change in found.recover("m0").values()} == {torch.float32}
    full = {name: {p: Factored(c.B.float(), c.A.float()) for p, c in of.items()} for name, of in models.items()}
    assert_as_told(found, full, tolerance=1e-5)


def test_inputs_stay_as_they_were() -> None:
    models = alike()
    before = {name: {path: change.dense() for path, change in of.items()} for name, of in models.items()}
    compress(models)
    assert all(models[name][path].dense().equal(before[name][path]) for name in models for path in SHAPES)


def test_recovered_models_can_be_merged_on() -> None:
    models = alike()
    found = compress(models, tolerance=0.2)
    both = [found.recover(name)["a"] for name in ("m0", "m1")]
    exact = weighted_sum([models["m0"]["a"], models["m1"]["a"]], [0.5, 0.5])
    assert relative(weighted_sum(both, [0.5, 0.5]), exact) < 0.3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"basis": 2, "tolerance": 0.1}, r"basis=2 and tolerance=0.1 cannot both be asked for"),
        ({"basis": 0}, "basis=0 is not usable; it must be at least 1"),
        ({"tolerance": -0.1}, "tolerance=-0.1 is not usable"),
        ({"tolerance": float("nan")}, "tolerance=nan is not usable"),
        ({"granularity": "row"}, "granularity='row' is not usable; it is position or layer"),
    ],
)
def test_unusable_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        compress(alike(count=2), **options)


def test_no_models_and_models_of_other_shapes_are_refused() -> None:
    with pytest.raises(OptionError, match="no models"):
        compress({})
    models = {"x": {"a": Factored(drawn(4, 1), drawn(1, 3))}, "y": {"a": Factored(drawn(4, 1), drawn(1, 5))}}
    with pytest.raises(OptionError, match="'a' is 4 x 3 in x, 4 x 5 in y"):
        compress(models)


def test_unknown_names_are_refused() -> None:
    models = alike()
    del models["m1"]["b"]
    found = compress(models)
    with pytest.raises(OptionError, match=r"no model 'm11'\. Did you mean 'm1'\? The models are: m0, m1"):
        found.recover("m11")
    assert "b" not in found.recover("m1")


@pytest.mark.parametrize(
    "options",
    [{}, {"granularity": "layer", "center": True}, {"tolerance": 0.05}, {"align": False}],
    ids=["default", "layer", "tolerance", "as given"],
)
def test_saved_and_loaded_again_it_is_the_same(options: dict[str, Any], tmp_path: Path) -> None:
    models = alike()
    models["m1"] = {"b": Factored(models["m1"]["b"].B[:, :2], models["m1"]["b"].A[:2])}
    found = compress(models, **options)
    loaded = Reversible.load(found.save(tmp_path / "saved"))
    assert loaded.names == found.names
    assert loaded.errors == found.errors
    assert (loaded.values, loaded.separate_values) == (found.values, found.separate_values)
    for name in models:
        for path, change in found.recover(name).items():
            assert loaded.recover(name)[path].B.equal(change.B)
            assert loaded.recover(name)[path].A.equal(change.A)
    before = files(tmp_path / "saved")
    loaded.save(tmp_path / "saved")
    assert files(tmp_path / "saved") == before


def test_a_folder_of_something_else_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds something else \(no reversible.json in it\)"):
        compress(alike()).save(tmp_path)
    assert files(tmp_path) == {"notes.txt": b"mine"}


def test_writing_that_fails_leaves_the_older_folder(tmp_path: Path, monkeypatch: Any) -> None:
    compress(alike()).save(tmp_path / "saved")
    before = files(tmp_path / "saved")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("isotune.checkpoint.paired_files.save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        compress(alike(count=7)).save(tmp_path / "saved")
    assert files(tmp_path / "saved") == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["saved"]


def damaged(folder: Path, what: str) -> None:
    index, values = folder / "reversible.json", folder / "reversible.safetensors"
    said, tensors = json.loads(index.read_text()), load_file(values)
    if what == "no index":
        index.unlink()
    elif what == "no values":
        values.unlink()
    elif what == "truncated":
        values.write_bytes(values.read_bytes()[:-7])
    elif what == "no json":
        index.write_text(index.read_text()[:-20])
    elif what == "no object":
        index.write_text("[]")
    elif what == "newer":
        index.write_text(json.dumps({**said, "format": 2}))
    elif what == "renamed":
        index.write_text(index.read_text().replace('"m0"', '"m9"'))
    elif what == "sorted":
        members = said["sites"]["a"]["members"]
        said["sites"]["a"]["members"] = dict(reversed(members.items()))
        index.write_text(json.dumps(said))
    elif what == "altered":
        tensors["a.B.basis"][0, 0, 0] += 1
        save_file(tensors, values)
    elif what == "one more":
        save_file({**tensors, "more": torch.zeros(1)}, values)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("no index", r"holds no reversible\.json"),
        ("no values", "missing, truncated or damaged"),
        ("truncated", "missing, truncated or damaged"),
        ("no json", "cannot be read"),
        ("no object", "is damaged"),
        ("newer", "format version 2, this isotune reads version 1; upgrade"),
        ("renamed", "do not match their digest"),
        ("sorted", "do not match their digest"),
        ("altered", "do not match their digest"),
        ("one more", "do not match their digest"),
    ],
)
def test_damaged_folders_are_refused(what: str, said: str, tmp_path: Path) -> None:
    folder = compress(alike()).save(tmp_path / "saved")
    damaged(folder, what)
    with pytest.raises(CheckpointError, match=said):
        Reversible.load(folder)


MEMBERS = {"x": [2, 2, [0.0, 0.0, 0.0]]}
KEPT = {"B.0": [4, 2], "A.0": [2, 3]}


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"shape": [4, 3], "members": MEMBERS, "tensors": {**KEPT, "B.0": [5, 2]}}, "do not agree"),
        ({"shape": [4, 3], "members": MEMBERS}, "do not agree"),
        ({"shape": [4, 9], "members": MEMBERS, "tensors": KEPT}, "another shape than it should"),
        ({"shape": [4], "members": MEMBERS, "tensors": KEPT}, "does not make sense"),
        ({"shape": [4, 3], "members": {"x": [1, 2, [0, 0, 0]]}, "tensors": KEPT}, "another shape than it should"),
        ({"shape": [4, 3], "members": {"x": [2, 2, [0, 0]]}, "tensors": KEPT}, "does not make sense"),
        ({"shape": [4, 3], "members": {**MEMBERS, "y": [1, 1, [0, 0, 0]]}, "tensors": KEPT}, "does not make sense"),
        ({"shape": [4, 3], "members": {"z": [2, 2, [0, 0, 0]]}, "tensors": KEPT}, "unknown models z"),
    ],
)
def test_an_index_that_does_not_fit_its_tensors_is_refused(entry: dict[str, Any], said: str, tmp_path: Path) -> None:
    tensors = {"a.B.0": torch.zeros(4, 2), "a.A.0": torch.zeros(2, 3)}
    write_sealed(tmp_path, "reversible", {"names": ["x"], "sites": {"a": entry}}, tensors)
    with pytest.raises(CheckpointError, match=said):
        Reversible.load(tmp_path)


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    found = compress(alike())
    found.sites["a"].tensors["B.basis"][0, 0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"not finite \(NaN or infinity\) in a\.B\.basis"):
        Reversible.load(found.save(tmp_path / "saved"))


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no reversible\.json"):
        Reversible.load(tmp_path / "nowhere")
