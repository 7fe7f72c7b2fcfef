"""OPCM against its paper's algorithm on dense matrices, its invariants, and models that arrive one at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from isotune.errors import CheckpointError, OptionError
from isotune.linalg.change import Change, dense, product, scaled, size
from isotune.linalg.low_rank import Factored
from isotune.merging.continual import FILE, OPCMState
from isotune.merging.contract import Aligned
from isotune.merging.rules.opcm import OPCM
from isotune.merging.run import Run
from merging.drawn import assert_same, factors, merged, site, tensors

SHAPES = {"a": (12, 9), "b": (8, 16), "c": (10, 10)}


def paper(models: list[dict[str, Tensor]], alpha: float) -> dict[str, Tensor]:
    """The paper's algorithm: full bases; the merged model rescaled after each arrival, with a factor to undo it."""

    def whole(model: dict[str, Tensor]) -> float:
        return math.hypot(*(float(change.norm()) for change in model.values()))

    now, norms, factor = models[0], [whole(models[0])], 1.0
    for model in models[1:]:
        norms.append(whole(model))
        added = {}
        for path, change in model.items():
            cleaned = change
            if change.ndim == 2:
                U, s, Vh = torch.linalg.svd(now[path])
                P = U.mT @ change @ Vh.mT
                k = int((s.cumsum(0) / s.sum() > alpha).int().argmax())
                P.diagonal().zero_()
                P[:k, :k] = 0
                cleaned = U @ P @ Vh
            added[path] = factor * now[path] + cleaned
        factor = whole(added) / (sum(norms) / len(norms))
        now = {path: change / factor for path, change in added.items()}
    return now


def drawn_models(count: int, ranks: Sequence[int] | None = None) -> list[dict[str, Change]]:
    """Changes of three weights and a bias, dense of full rank, or factored."""
    models = []
    for index in range(count):
        model: dict[str, Change] = {"bias": tensors(1, 1, 7, seed=100 + index)[0][0]}
        for seed, (path, (m, n)) in enumerate(SHAPES.items()):
            if ranks is None:
                model[path] = tensors(1, m, n, seed=10 * index + seed)[0]
            else:
                model[path] = factors(m, n, ranks[index : index + 1], seed=10 * index + seed)[0]
        models.append(model)
    return models


def sites_of(models: Sequence[dict[str, Change]], first: int = 0, weight: float = 1.0) -> list[Aligned]:
    names = tuple(f"model {first + index}" for index in range(len(models)))
    return [
        Aligned(path, names, tuple(model[path] for model in models), (weight,) * len(models), path != "bias")
        for path in models[0]
    ]


def at_once(rule: OPCM, models: Sequence[dict[str, Change]]) -> dict[str, Tensor]:
    run = Run(rule, lambda: iter(sites_of(models)))
    found = {site.path: change for site, change in run}
    return {path: dense(scaled(change, run.factor)) for path, change in found.items()}


def densely(model: dict[str, Change]) -> dict[str, Tensor]:
    return {path: dense(change) for path, change in model.items()}


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.7])
def test_dense_changes_of_full_rank_give_the_papers_algorithm(alpha: float) -> None:
    models = drawn_models(4)
    expected = paper([densely(model) for model in models], alpha)
    for compat in (False, True):
        found = at_once(OPCM(alpha=alpha, compat=compat), models)
        for path, change in found.items():
            assert_same(change, expected[path])


def test_compat_projects_in_the_null_space_as_the_papers_code_does() -> None:
    models = drawn_models(2, ranks=(2, 3))
    expected = paper([densely(model) for model in models], 0.5)
    found, ours = at_once(OPCM(compat=True), models), at_once(OPCM(), models)
    for path in expected:
        assert_same(found[path], expected[path])
    # What the paper's code takes from the arbitrary basis of the null space is no small part.
    assert max(float((ours[path] - expected[path]).norm() / expected[path].norm()) for path in SHAPES) > 0.05


@pytest.mark.parametrize("as_dense", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_what_is_added_is_orthogonal_to_what_is_merged(alpha: float, as_dense: bool) -> None:
    before, arriving = factors(14, 10, (4, 3))
    inputs: list[Change] = [dense(before), dense(arriving)] if as_dense else [before, arriving]
    D = dense(before)
    added = merged("opcm", inputs, alpha=alpha) - D
    U, s, Vh = torch.linalg.svd(D)
    k = 4 if alpha == 1 else int((s.cumsum(0) / s.sum() > alpha).int().argmax())
    assert product(added, D) == pytest.approx(0, abs=1e-10)
    assert float((U[:, :k].mT @ added @ Vh[:k].mT).norm()) < 1e-12
    assert (U.mT @ added @ Vh.mT).diagonal()[:4].abs().max() < 1e-12
    assert float(added.norm()) < size(arriving)


def test_larger_alpha_protects_more_up_to_one() -> None:
    before, arriving = factors(14, 10, (6, 6))
    left = [float((merged("opcm", [before, arriving], alpha=a) - dense(before)).norm()) for a in (0.0, 0.4, 0.8, 1.0)]
    assert left == sorted(left, reverse=True)
    # The paper's code protects nothing but the diagonal at 1, as at 0, since no share exceeds 1.
    exact = torch.diag(torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64))
    other = tensors(1, 4, 4)[0]
    assert_same(merged("opcm", [exact, other], alpha=1.0, compat=True), merged("opcm", [exact, other], alpha=0.0))
    assert_same(merged("opcm", [exact, other], alpha=1.0), exact)


def test_the_same_model_twice_leaves_the_direction_unchanged() -> None:
    change = factors(14, 10, (4,))[0]
    assert_same(merged("opcm", [change, change]), dense(change))
    assert_same(merged("opcm", [change, change.scaled(-3)]), dense(change))


def test_the_merged_change_has_the_mean_norm_of_the_models() -> None:
    models = drawn_models(4, ranks=(3, 1, 2, 2))
    norms = [math.hypot(*(size(change) for change in model.values())) for model in models]
    for rule in (OPCM(), OPCM(rank=2)):
        for count in (1, 2, 4):
            found = at_once(rule, models[:count])
            whole = math.hypot(*(float(change.norm()) for change in found.values()))
            assert whole == pytest.approx(sum(norms[:count]) / count, rel=1e-12)


def test_weights_multiply_the_changes_before_they_are_projected() -> None:
    changes, weights = factors(14, 10, (3, 2, 2)), [0.5, -1.0, 2.0]
    multiplied = [change.scaled(w) for change, w in zip(changes, weights, strict=True)]
    assert_same(merged("opcm", changes, weights), merged("opcm", multiplied))


def test_rank_bounds_what_is_kept_of_each_step() -> None:
    changes = factors(30, 20, (4, 4, 4))
    for inputs in (changes, [dense(change) for change in changes]):
        found = OPCM(rank=5).merge(site(inputs), None)
        assert isinstance(found, Factored)
        assert found.rank == 5
        assert_same(dense(found), merged("opcm", changes, rank=5), 1e-9)
    assert_same(merged("opcm", changes, rank=12), merged("opcm", changes))
    assert OPCM(rank=2).merge(site(changes[:1]), None).shape == (30, 20)
    assert torch.linalg.matrix_rank(merged("opcm", changes[:1], rank=2)) == 2


@pytest.mark.parametrize("rule", [OPCM(), OPCM(alpha=0.3, rank=3), OPCM(compat=True)])
@pytest.mark.parametrize("as_dense", [False, True])
def test_arriving_one_at_a_time_gives_what_all_at_once_give(tmp_path: Path, rule: OPCM, as_dense: bool) -> None:
    models = drawn_models(4, None if as_dense else (3, 1, 2, 2))
    expected = at_once(rule, models)
    state = OPCMState(rule)
    for index, model in enumerate(models):
        state.add(sites_of([model], index))
        state.save(tmp_path / "state")
        state = OPCMState.load(tmp_path / "state")
    assert state.rule == rule
    assert list(state.norms) == ["model 0", "model 1", "model 2", "model 3"]
    found = dict(state.changes())
    assert found.keys() == expected.keys()
    for path, change in found.items():
        assert_same(dense(change), expected[path], 1e-9)
    both = OPCMState(rule)
    both.add(sites_of(models[:2]))
    both.add(sites_of(models[2:], 2))
    for path, change in both.changes():
        assert_same(dense(change), expected[path], 1e-9)


def test_a_state_of_given_rank_does_not_grow_with_the_models_that_arrive(tmp_path: Path) -> None:
    models, sizes = drawn_models(8, ranks=(2,) * 8), []
    state = OPCMState(OPCM(rank=3))
    for index, model in enumerate(models):
        state.add(sites_of([model], index))
        state.save(tmp_path / "state")
        with safe_open(tmp_path / "state" / FILE, framework="pt") as opened:
            sizes.append(sum(math.prod(opened.get_slice(key).get_shape()) for key in opened.keys()))  # noqa: SIM118
    assert sizes[1:] == [sizes[1]] * 7
    assert sizes[1] == 7 + sum(3 * (m + n) for m, n in SHAPES.values())


def test_a_state_takes_models_that_touch_other_weights() -> None:
    one, other = drawn_models(2, ranks=(2, 2))
    state = OPCMState()
    assert dict(state.changes()) == {}
    state.add([site for site in sites_of([one]) if site.path == "a"])
    state.add([site for site in sites_of([other], 1) if site.path != "a"])
    factor = (state.norms["model 0"] + state.norms["model 1"]) / 2 / math.hypot(*state.norms.values())
    for path, change in state.changes():
        assert_same(dense(change), factor * dense((one if path == "a" else other)[path]))


def test_an_arrival_that_fails_leaves_the_state_as_it_was() -> None:
    one, other = drawn_models(2, ranks=(2, 2))
    state = OPCMState()
    state.add(sites_of([one]))
    before = dict(state.changes())
    with pytest.raises(OptionError, match="'model 0' was merged before"):
        state.add(sites_of([other]))
    misshapen = {**other, "c": factors(10, 11, (2,))[0]}
    with pytest.raises(CheckpointError, match=r"change of c by 'model 1' has shape \(10, 11\).* \(10, 10\)"):
        state.add(sites_of([misshapen], 1))
    assert list(state.norms) == ["model 0"]
    for path, change in state.changes():
        assert dense(change).equal(dense(before[path]))


def test_a_state_that_is_absent_or_damaged_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no state of a merge"):
        OPCMState.load(tmp_path / "nothing")
    state = OPCMState()
    state.add(sites_of(drawn_models(1)))
    state.save(tmp_path / "state")
    file = tmp_path / "state" / FILE
    whole = file.read_bytes()
    for damaged in (whole[:-9], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="no state of a merge"):
            OPCMState.load(tmp_path / "state")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").write_text("mine")
    with pytest.raises(CheckpointError, match="holds something else"):
        state.save(tmp_path / "other")
