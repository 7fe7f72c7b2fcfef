"""The rules that weigh entries by a statistic: fisher, ota and ffg."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from isotune.errors import OptionError
from isotune.linalg.change import Change, dense
from isotune.linalg.low_rank import Factored
from isotune.linalg.spectral_norm import spectral_norm
from isotune.merging.contract import Aligned, Rule
from isotune.merging.registry import rule
from isotune.merging.rules.families.by_statistic import LogHistogram, saliency
from isotune.merging.run import Run

SHAPES = {"a": (9, 14), "b": (20, 6)}


def drawn(count: int, seed: int = 0) -> dict[str, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {p: [torch.randn(s, generator=generator).double() for _ in range(count)] for p, s in SHAPES.items()}


def statistics(count: int, seed: int = 1) -> dict[str, list[Tensor]]:
    """Over many orders of magnitude, as real ones are."""
    return {p: [10 ** (2 * t - 12) for t in found] for p, found in drawn(count, seed).items()}


def merge(
    name: str,
    changes: dict[str, list[Tensor]],
    found: dict[str, list[Any]],
    weights: tuple[float, ...] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    chosen = rule(name, **options)
    assert isinstance(chosen, Rule)
    sites = [
        Aligned(p, tuple("xyz"[: len(own)]), tuple(own), weights or (1.0,) * len(own), statistics=tuple(found[p]))
        for p, own in changes.items()
    ]
    return {site.path: dense(change) for site, change in Run(chosen, lambda: iter(sites))}


def assert_all_close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    for path in one:
        torch.testing.assert_close(one[path], other[path], rtol=tolerance, atol=tolerance)


def means(changes: dict[str, list[Tensor]], weights: tuple[float, ...]) -> dict[str, Tensor]:
    return {
        p: sum((c * t for c, t in zip(weights, own, strict=True)), torch.zeros(())) / sum(weights)
        for p, own in changes.items()
    }


WEIGHTED = ["fisher", "ota"]


@pytest.mark.parametrize("name", WEIGHTED)
def test_equal_statistics_give_the_weighted_mean(name: str) -> None:
    changes, same = drawn(3), {p: own * 3 for p, own in statistics(1).items()}
    found = merge(name, changes, same, (1.0, 0.5, 2.0))
    assert_all_close(found, means(changes, (1.0, 0.5, 2.0)))


@pytest.mark.parametrize(
    ("name", "options"), [("fisher", {}), ("ota", {"normalise": "model"}), ("ota", {"normalise": "tensor"})]
)
def test_scale_of_one_models_statistic_does_not_matter_once_normalised(name: str, options: Any) -> None:
    changes, found = drawn(3), statistics(3)
    other = {p: [1e4 * own[0], own[1], 1e-7 * own[2]] for p, own in found.items()}
    assert_all_close(merge(name, changes, found, **options), merge(name, changes, other, **options))


@pytest.mark.parametrize("name", ["fisher", "ota", "ffg"])
def test_scale_of_all_statistics_does_not_matter(name: str) -> None:
    changes, found = drawn(3), statistics(3)
    # A power of two, so that the thresholds of ffg, on a grid of such, move with the scores.
    other = {p: [2.0**-50 * v for v in own] for p, own in found.items()}
    assert_all_close(merge(name, changes, found), merge(name, changes, other))


@pytest.mark.parametrize("name", WEIGHTED)
def test_model_that_knows_nothing_has_no_say(name: str) -> None:
    changes, found = drawn(2), statistics(2)
    found = {p: [own[0], torch.zeros_like(own[1])] for p, own in found.items()}
    assert_all_close(merge(name, changes, found), {p: own[0] for p, own in changes.items()})


@pytest.mark.parametrize("name", ["fisher", "ota", "ffg"])
def test_result_lies_among_the_changes_and_is_finite_without_information(name: str) -> None:
    changes, found = drawn(3), statistics(3)
    for own in found.values():
        for v in own:
            v[:4] = 0
    for options in ({}, {"floor": 0.0} if name == "fisher" else {}, {"eps": 0.0} if name == "ota" else {}):
        for path, value in merge(name, changes, found, **options).items():
            every = torch.stack([*changes[path], torch.zeros_like(value)])
            assert value.isfinite().all()
            assert (value <= every.amax(0) + 1e-12).all()
            assert (value >= every.amin(0) - 1e-12).all()
    zero = {p: [torch.zeros_like(v) for v in own] for p, own in found.items()}
    if name != "ffg":
        assert_all_close(merge(name, changes, zero), means(changes, (1.0, 1.0, 1.0)))


@pytest.mark.parametrize("name", ["fisher", "ota", "ffg"])
def test_tiny_statistics_in_fp32_are_no_zeros(name: str) -> None:
    changes = {p: [t.float() for t in own] for p, own in drawn(2).items()}
    found = {p: [(1e-20 * v).float() for v in own] for p, own in statistics(2).items()}
    exact = merge(name, drawn(2), {p: [v.double() for v in own] for p, own in found.items()})
    assert_all_close({p: t.double() for p, t in merge(name, changes, found).items()}, exact, 1e-4)


def test_fisher_is_its_formula_and_a_weight_multiplies_it() -> None:
    changes, F = drawn(2), statistics(2)
    norms = [sum(float(own[i].square().sum()) for own in F.values()) ** 0.5 for i in range(2)]
    found = merge("fisher", changes, F, (1.0, 3.0), floor=0.0)
    for path, (one, other) in changes.items():
        a, b = F[path][0] / norms[0], 3 * F[path][1] / norms[1]
        torch.testing.assert_close(found[path], (a * one + b * other) / (a + b))
    plain = merge("fisher", changes, F, (1.0, 3.0), floor=0.0, normalize=False)
    one, other = changes["a"]
    torch.testing.assert_close(plain["a"], (F["a"][0] * one + 3 * F["a"][1] * other) / (F["a"][0] + 3 * F["a"][1]))


def test_favored_model_stands_where_none_has_information() -> None:
    changes, F = drawn(2), statistics(2)
    for own in F.values():
        own[0][:3], own[1][:3] = 0, 0
    for index, name in enumerate("xy"):
        found = merge("fisher", changes, F, favor=name)
        torch.testing.assert_close(found["a"][:3], changes["a"][index][:3])
    both = merge("fisher", changes, F)
    assert not torch.allclose(both["a"][:3], changes["a"][0][:3])
    with pytest.raises(OptionError, match=r"favor='w' is none of the models\. They are: x, y\."):
        merge("fisher", changes, F, favor="w")


def test_ota_is_its_formula() -> None:
    changes, v = drawn(2), statistics(2)
    for power in (0.25, 1.0):
        found = merge("ota", changes, v, (2.0, 1.0), power=power, eps=0.0)
        for path, (one, other) in changes.items():
            a, b = 2 * v[path][0] ** power, v[path][1] ** power
            torch.testing.assert_close(found[path], (a * one + b * other) / (a + b))


def test_weights_of_models_are_kept_when_normalising() -> None:
    """The authors scale v by c and then divide by the mean of that, so that c has no effect."""
    changes, same = drawn(2), {p: own * 2 for p, own in statistics(1).items()}
    for normalise in ("tensor", "model"):
        found = merge("ota", changes, same, (1.0, 3.0), normalise=normalise)
        assert_all_close(found, means(changes, (1.0, 3.0)))


@pytest.mark.parametrize("density", [0.05, 0.4, 0.9, 1.0])
def test_density_is_that_of_the_whole_model(density: float) -> None:
    changes, v = drawn(1), statistics(1)
    v["b"] = [100 * v["b"][0]]
    found = merge("ffg", changes, v, density=density)
    scores = torch.cat([saliency(changes[p][0], v[p][0]).flatten() for p in SHAPES])
    kept = torch.cat([found[p].flatten() != 0 for p in SHAPES])
    assert density - 1e-9 <= kept.double().mean() <= density + 0.02
    assert not kept.any() or kept.all() or scores[kept].min() > scores[~kept].max()
    for path, (change,) in changes.items():
        assert ((found[path] == 0) | (found[path] == change)).all()


def test_masks_grow_with_the_density() -> None:
    changes, v = drawn(1), statistics(1)
    before = torch.zeros(SHAPES["a"], dtype=torch.bool)
    for density in (0.1, 0.3, 0.31, 0.7, 1.0):
        kept = merge("ffg", changes, v, density=density)["a"] != 0
        assert (kept | ~before).all()
        before = kept
    assert before.all()


def test_histogram_finds_the_quantile() -> None:
    values = 10 ** (6 * torch.randn(20_000, dtype=torch.float64) - 20)
    histogram = LogHistogram()
    for part in values.split(3000):
        histogram.add(part)
    for share in (0.001, 0.3, 0.999):
        exact = float(values.sort(descending=True).values[math.ceil(share * len(values)) - 1])
        assert 0.99 * exact <= histogram.threshold(share) <= exact
    assert histogram.threshold(1.0) <= float(values.min())
    zeros = LogHistogram()
    zeros.add(torch.zeros(5))
    assert zeros.threshold(0.2) == 0.0


def test_ota_leaves_the_base_where_every_model_is_masked_and_averages_survivors() -> None:
    changes, v = drawn(2), statistics(2)
    masks = [
        {p: t != 0 for p, t in merge("ffg", {p: [own[i]] for p, own in changes.items()},
                                     {p: [own[i]] for p, own in v.items()}, density=0.4).items()}
        for i in range(2)
    ]  # fmt: skip
    found = merge("ota", changes, v, density=0.4, power=1.0, eps=0.0)
    averaged = merge("ota", changes, v, density=0.4, fallback="mean")
    for path, (one, other) in changes.items():
        a, b = masks[0][path], masks[1][path]
        assert (~a & ~b).any()
        assert (found[path][~a & ~b] == 0).all()
        torch.testing.assert_close(found[path][a & ~b], one[a & ~b])
        torch.testing.assert_close(averaged[path][~a & ~b], ((one + other) / 2)[~a & ~b])
        w = [v[path][0] * a, v[path][1] * b]
        torch.testing.assert_close(found[path][a | b], ((w[0] * one + w[1] * other) / (w[0] + w[1]))[a | b])


def test_tiny_moments_are_not_taken_for_masked() -> None:
    """The authors take `Σ w <= 1.1 T ε` for fully masked, which a tiny v is as well."""
    changes, v = drawn(2), {p: [1e-60 * t for t in own] for p, own in statistics(2).items()}
    assert all((value != 0).all() for value in merge("ota", changes, v, density=1.0, power=1.0).values())


def test_ffg_is_the_mean_of_the_masked_changes_with_or_without_rescaling() -> None:
    """In the authors' linear mode the mask is applied only where `rescale` is on."""
    changes, v = drawn(2), statistics(2)
    found = merge("ffg", changes, v, (1.0, 3.0), density=0.3)["a"]
    alone = [
        merge("ffg", {p: [own[i]] for p, own in changes.items()}, {p: [own[i]] for p, own in v.items()},
              density=0.3)["a"]
        for i in range(2)
    ]  # fmt: skip
    torch.testing.assert_close(found, (alone[0] + 3 * alone[1]) / 4)
    assert not torch.allclose(found, means(changes, (1.0, 3.0))["a"])


@pytest.mark.parametrize("name", ["ffg", "ota"])
def test_operator_norm_can_be_kept(name: str) -> None:
    B, A = torch.randn(90, 2).double(), torch.randn(2, 100).double()
    v = (2 * torch.randn(90, 100).double() - 12).exp()
    chosen = rule(name, density=0.2, keep_norm=True)
    assert isinstance(chosen, Rule)
    norm = torch.linalg.matrix_norm(B @ A, 2)
    forms: list[Change] = [Factored(B, A), B @ A]
    for change in forms:
        site = Aligned("a", ("x",), (change,), (1.0,), statistics=(v,))
        ((_, merged),) = Run(chosen, lambda site=site: iter([site]))  # type: ignore[misc]
        torch.testing.assert_close(torch.linalg.matrix_norm(dense(merged), 2), norm, rtol=0.01, atol=0)
        assert (dense(merged) == 0).double().mean() > 0.75
    for value in (torch.randn(40, 6), torch.randn(50)):
        site = Aligned("e", ("x",), (value,), (1.0,), False, (torch.rand(value.shape),))
        ((_, merged),) = Run(chosen, lambda site=site: iter([site]))  # type: ignore[misc]
        length = value.norm() if value.dim() == 1 else value.norm(dim=1).max()
        torch.testing.assert_close(dense(merged).norm(dim=-1).max(), length)


@pytest.mark.parametrize("shape", [(0, 3), (5, 4), (90, 200), (200, 90)])
def test_spectral_norm(shape: tuple[int, int]) -> None:
    W = torch.randn(shape)
    expected = torch.linalg.matrix_norm(W, 2) if W.numel() else torch.zeros(())
    assert spectral_norm(W) == pytest.approx(float(expected), rel=5e-3)
    assert spectral_norm(W) <= float(expected) * (1 + 1e-5)


@pytest.mark.parametrize(
    ("name", "kind", "remedy"),
    [
        ("fisher", "fisher", "isotune statistics RUN --fisher"),
        ("ota", "second_moment", "save_second_moments"),
        ("ffg", "second_moment", "save_second_moments"),
    ],
)
def test_missing_statistic_names_model_weight_and_remedy(name: str, kind: str, remedy: str) -> None:
    changes, found = drawn(2), statistics(2)
    without: dict[str, list[Any]] = {**found, "b": [found["b"][0], None]}
    with pytest.raises(OptionError, match=rf"{name} needs the {kind} of 'b', and 'y' has none; .*{remedy}"):
        merge(name, changes, without)
    with pytest.raises(OptionError, match=remedy):
        merge(name, changes, {p: [] for p in changes})
    # A model that left the weight alone needs none, and has no say there.
    changes["b"][1] = torch.zeros(SHAPES["b"]).double()
    factor = 0.5 if name == "ffg" else 1.0
    options = {"density": 1.0} if name == "ffg" else {}
    torch.testing.assert_close(merge(name, changes, without, **options)["b"], factor * changes["b"][0])


@pytest.mark.parametrize("name", ["fisher", "ota", "ffg"])
def test_negative_weight_is_refused(name: str) -> None:
    with pytest.raises(OptionError, match=f"{name} is a weighted mean: its weights are 0 or more, not -1"):
        merge(name, drawn(2), statistics(2), (2.0, -1.0))
