"""TIES, DARE, DELLA, magnitude pruning and breadcrumbs: rules on single entries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import peft.utils.merge_utils as peft_merge
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from isotune.errors import OptionError
from isotune.linalg.low_rank import Factored
from isotune.merging.contract import Rule
from isotune.merging.registry import rule_class, rule_names
from isotune.merging.rules.breadcrumbs import Breadcrumbs
from isotune.merging.rules.dare import DARE
from isotune.merging.rules.dare_ties import DARETIES
from isotune.merging.rules.della import DELLA, ascending
from isotune.merging.rules.families import entrywise
from isotune.merging.rules.families.entrywise import Elected, Entrywise, agreed, walk
from isotune.merging.rules.magnitude import Magnitude
from isotune.merging.rules.sum import Sum
from isotune.merging.rules.ties import TIES
from merging.drawn import factored, merge, site, tensors

RULES: list[Any] = [found for name in rule_names() if issubclass(found := rule_class(name), Entrywise)]
ELECTED: list[Any] = [rule for rule in RULES if issubclass(rule, Elected)]
AVERAGES = ("mean", "count", "sum", "max")
ELECTIONS = ("total", "frequency", "weighted")


def test_there_are_the_rules() -> None:
    assert {rule.name for rule in RULES} == {"ties", "magnitude", "breadcrumbs", "dare", "dare_ties", "della"}
    assert {rule.name for rule in ELECTED} == {"ties", "dare_ties", "della"}


def ties_of_the_paper(models: Sequence[Sequence[Tensor]], density: float) -> list[Tensor]:
    """All models flattened, each trimmed, elected and averaged, the slow way."""
    flat = torch.stack([torch.cat([tensor.flatten() for tensor in model]) for model in models])
    for row in flat:
        least = row.abs().sort(descending=True).values[round(density * len(row)) - 1]
        row[row.abs() < least] = 0
    sign = flat.sum(0).sign()
    agreeing = flat.where(flat.sign() == sign, 0)
    merged = agreeing.sum(0) / (agreeing != 0).sum(0).clamp(min=1)
    shapes = [tensor.shape for tensor in models[0]]
    parts = merged.split([shape.numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def test_ties_is_that_of_the_paper_over_the_whole_model() -> None:
    shapes = ((40, 30), (25, 16), (60,))
    # Weights and models of very different size: no common scale, and one tensor that trimming leaves nothing of.
    sizes = (1, 0.3, 1e-9)
    models = [
        [3.0**i * sizes[j] * tensors(1, *shape, seed=i + 10 * j)[0] for j, shape in enumerate(shapes)]
        for i in range(3)
    ]
    sites = [
        site([model[j] for model in models], path=str(j), matrix=len(shape) == 2) for j, shape in enumerate(shapes)
    ]
    found = merge(TIES(), *sites)
    for own, expected in zip(found, ties_of_the_paper(models, 0.2), strict=True):
        torch.testing.assert_close(own, expected)
    assert found[2].abs().max() == 0
    assert merge(TIES(trim="tensor"), *sites)[2].abs().max() > 0


def test_ties_trims_over_the_weights_that_a_model_changed() -> None:
    a, b = tensors(2, 20, 30)
    untouched = Factored(torch.zeros(20, 0, dtype=a.dtype), torch.zeros(0, 30, dtype=a.dtype))
    untrained = Factored(torch.zeros(20, 4, dtype=a.dtype), torch.ones(4, 30, dtype=a.dtype))
    alone = merge(TIES(), site([a]))
    assert int((alone != 0).sum()) == 120
    for nothing in (untouched, untrained, 0 * a):
        found = merge(TIES(), site([a, 0 * b], path="a"), site([nothing, b], path="b"))
        torch.testing.assert_close(found, [alone, merge(TIES(), site([b]))])


@pytest.mark.parametrize("elect", ["total", "frequency"])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 2.0, 1.0)])
def test_ties_of_single_weights_is_that_of_peft_with_its_average(elect: Any, weights: tuple[float, ...]) -> None:
    changes = tensors(3, 30, 20)
    expected = peft_merge.ties(changes, torch.tensor(weights, dtype=torch.float64), 0.8, elect)
    found = merge(TIES(density=0.8, trim="tensor", elect=elect, average="count"), site(changes, weights))
    tie = torch.zeros(30, 20, dtype=torch.bool)
    if elect == "frequency":
        votes = sum(peft_merge.prune(change, 0.8, "magnitude").sign() for change in changes)
        tie = votes == 0
        assert tie.any()
    torch.testing.assert_close(found[~tie], expected[~tie])


def test_a_tie_by_frequency_is_decided_by_the_sum_where_peft_takes_the_positive_model() -> None:
    changes = [torch.tensor([0.1, -3.0, 2.0]), torch.tensor([-5.0, 0.2, 2.0])]
    found = merge(TIES(density=1.0, elect="frequency", average="count"), site(changes))
    torch.testing.assert_close(found, torch.tensor([-5.0, -3.0, 2.0]))
    with pytest.warns(UserWarning, match="no pruning"):
        theirs = peft_merge.ties(changes, torch.ones(2), 1.0, "frequency")
    torch.testing.assert_close(theirs, torch.tensor([0.1, 0.2, 2.0]))


def test_weights_that_sum_to_one_do_not_shrink_the_result_as_in_peft() -> None:
    (change,) = tensors(1, 30, 20)
    here = site([change] * 4, [0.25] * 4)
    kept = peft_merge.magnitude_based_pruning(change, 0.2)
    torch.testing.assert_close(merge(TIES(trim="tensor"), here), kept)
    theirs = peft_merge.ties([change] * 4, torch.full((4,), 0.25, dtype=torch.float64), 0.2)
    torch.testing.assert_close(theirs, kept / 4)
    torch.testing.assert_close(merge(TIES(trim="tensor", average="count"), here), kept / 4)


def test_averages_of_the_models_that_agree() -> None:
    changes = [torch.tensor([1.0, -4.0, 0.5]), torch.tensor([3.0, 2.0, -1.0]), torch.tensor([-2.0, -1.0, 0.25])]
    here = site(changes, (1.0, 2.0, 1.0))
    expected = {
        "mean": [7 / 3, -5 / 2, -1.0],
        "count": [7 / 2, -5 / 2, -2.0],
        "sum": [7.0, -5.0, -2.0],
        "max": [6.0, -4.0, -2.0],
    }
    for average, values in expected.items():
        rule = TIES(density=1.0, average=average)
        torch.testing.assert_close(merge(rule, here), torch.tensor(values))
    # Weighted, the second entry has -4 + 4 - 1 and the last 0.5 - 2 + 0.25.
    rule = TIES(density=1.0, elect="weighted", scale=2.0)
    torch.testing.assert_close(merge(rule, here), torch.tensor([14 / 3, -5.0, -2.0]))


def test_opposite_entries_elect_no_sign() -> None:
    found = merge(TIES(density=1.0, average="sum"), site([torch.tensor([1.0, 2.0]), torch.tensor([-1.0, 2.0])]))
    torch.testing.assert_close(found, torch.tensor([0.0, 4.0]))


@given(st.integers(0, 999), st.sampled_from(ELECTIONS), st.sampled_from(AVERAGES), st.integers(2, 5))
def test_laws_of_the_election(seed: int, elect: Any, average: Any, count: int) -> None:
    blocks = [
        x * (y > 0) for x, y in zip(tensors(count, 4, 6, seed=seed), tensors(count, 4, 6, seed=seed + 1), strict=True)
    ]
    weights = [0.25 + i for i in range(count)]
    found = agreed(blocks, weights, elect, average)
    # Turning all entries turns the result.
    torch.testing.assert_close(agreed([-x for x in blocks], weights, elect, average), -found)
    # A negative weight is a positive one on the negated change.
    negated = agreed([-blocks[0], *blocks[1:]], [-weights[0], *weights[1:]], elect, average)
    torch.testing.assert_close(negated, found)
    # A model of weight 0 is as none at all.
    torch.testing.assert_close(agreed([*blocks, blocks[0] + 1], [*weights, 0.0], elect, average), found)
    # The mean does not depend on the sum of the weights, and lies between the models.
    if average == "mean":
        torch.testing.assert_close(agreed(blocks, [7 * w for w in weights], elect, average), found)
        assert (found.abs() <= torch.stack(blocks).abs().amax(0) + 1e-12).all()


def test_no_model_with_a_say_gives_zero() -> None:
    for average in AVERAGES:
        assert merge(TIES(average=average), site(tensors(2, 4, 4), (0.0, 0.0))).abs().max() == 0


def test_magnitude_pruning_is_that_of_peft_on_changes() -> None:
    changes, weights = tensors(3, 30, 20), (0.5, 2.0, -1.0)
    expected = peft_merge.magnitude_prune(changes, torch.tensor(weights, dtype=torch.float64), 0.25)
    torch.testing.assert_close(merge(Magnitude(density=0.25), site(changes, weights)), expected)
    sparse = merge(Magnitude(density=0.25, trim="model"), site(changes, weights))
    # The last kept entries may share a bin of the histogram.
    assert int((sparse != expected).sum()) <= 6


def kept(changes: Sequence[Tensor], rule: Rule) -> list[Tensor]:
    """What the rule leaves of each model, times what it is scaled by."""
    names = "stuvwxyz"
    return [merge(rule, site([change], names=names[i:])) for i, change in enumerate(changes)]


def test_dare_is_that_of_peft_with_the_same_masks() -> None:
    changes, weights = tensors(3, 30, 20), torch.tensor([0.5, 2.0, -1.0], dtype=torch.float64)
    masks = [(own != 0).double() for own in kept(changes, DARE(density=0.3))]
    pruned = [change * mask / 0.3 for change, mask in zip(changes, masks, strict=True)]
    expected = peft_merge.task_arithmetic(pruned, weights)
    torch.testing.assert_close(merge(DARE(density=0.3), site(changes, weights.tolist())), expected)

    weights = weights.abs()
    agreeing = peft_merge.calculate_majority_sign_mask(torch.stack(pruned))
    expected = peft_merge.disjoint_merge(torch.stack(pruned) * weights[:, None, None], agreeing)
    rule = DARETIES(density=0.3, average="count")
    torch.testing.assert_close(merge(rule, site(changes, weights.tolist())), expected)


def test_dare_and_della_are_unbiased() -> None:
    change = torch.linspace(-2, 3, 60, dtype=torch.float64).view(6, 10)
    draws = 2000
    for rule, least in ((DARE(density=0.5), 0.5), (DELLA(density=0.5, signs=False), 0.35)):
        found = torch.stack([merge(rule, site([change], seed=seed)) for seed in range(draws)])
        # The standard deviation of an entry is |x| sqrt((1 - p) / p).
        deviation = change.abs() * ((1 - least) / least / draws) ** 0.5
        assert ((found.mean(0) - change).abs() <= 5 * deviation).all()
        assert found.std(0).max() > 1
    biased = torch.stack([merge(DARE(density=0.25, unbiased=False), site([change], seed=s)) for s in range(200)])
    assert set((biased / change).unique().tolist()) == {0.0, 1.0}


def test_a_model_is_drawn_for_its_name_whatever_comes_with_it() -> None:
    changes = tensors(2, 20, 30)
    for rule in (DARE(), DELLA(signs=False)):
        first, second = kept(changes, rule)
        torch.testing.assert_close(merge(rule, site(changes)), first + second)
        same = kept([changes[0], changes[0]], rule)
        assert not same[0].equal(same[1])
        assert not merge(rule, site(changes, path="b")).equal(merge(rule, site(changes)))
        single = merge(rule, site([change.float() for change in changes]))
        assert (single != 0).equal(merge(rule, site(changes)) != 0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("block", [1, 100, 350, 2**30])
def test_the_size_of_a_block_does_not_matter(rule: Any, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    here = [site([*factored(2, 30, 20, 3), *tensors(1, 30, 20)], (1, 2, 0.5), path=path) for path in "ab"]
    before = merge(rule(), *here)
    monkeypatch.setattr(entrywise, "BLOCK", block)
    for found, expected in zip(merge(rule(), *here), before, strict=True):
        torch.testing.assert_close(found, expected)


def test_blocks_have_the_size_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entrywise, "BLOCK", 200)
    changes = [*factored(2, 30, 10, 3), *tensors(1, 30, 10)]
    found = list(walk(changes))
    assert [len(block) for _, blocks in found for block in blocks] == [20] * 3 + [10] * 3
    for index, change in enumerate(changes):
        whole = change.dense() if isinstance(change, Factored) else change
        torch.testing.assert_close(torch.cat([blocks[index] for _, blocks in found]), whole)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(1,), (), (3, 2, 2, 2), (1, 64), (64, 1), (0,), (3, 0)])
def test_tensors_of_any_shape(rule: Any, shape: tuple[int, ...]) -> None:
    changes = tensors(3, *shape)
    found = merge(rule(), site(changes, matrix=False))
    assert found.shape == shape
    assert found.isfinite().all()
    torch.testing.assert_close(merge(rule(**rule.neutral), site(changes[:1], matrix=False)), changes[0])


@pytest.mark.parametrize("rule", [Magnitude, TIES, Breadcrumbs])
@pytest.mark.parametrize("entries", [1, 2, 5, 64])
def test_small_tensors_are_never_erased(rule: Any, entries: int) -> None:
    (change,) = tensors(1, entries)
    found = merge(rule(density=0.01), site([change], matrix=False))
    assert int((found != 0).sum()) >= 1


def test_peft_erases_small_tensors_by_rounding_down() -> None:
    (change,) = tensors(1, 4)
    assert peft_merge.prune(change, 0.2, "magnitude").abs().max() == 0
    assert merge(Magnitude(density=0.2), site([change], matrix=False)).abs().max() == change.abs().max()


def breadcrumbs_by_order(change: Tensor, bottom: int, top: slice) -> Tensor:
    order = change.abs().flatten().sort().indices
    mask = torch.zeros(change.numel(), dtype=change.dtype)
    mask[order[slice(bottom, top.stop)]] = 1
    return change * mask.view(change.shape)


def test_breadcrumbs_keep_the_middle_and_all_of_it_where_nothing_is_an_outlier() -> None:
    (large,) = tensors(1, 20, 30)
    # 600 entries: 6 large and 54 small ones go.
    expected = breadcrumbs_by_order(large, 54, slice(-6))
    torch.testing.assert_close(merge(Breadcrumbs(), site([large])), expected)
    # 64 entries: no large one goes. mergekit slices up to "minus the number of large ones", here -0: nothing is left.
    (small,) = tensors(1, 64)
    found = merge(Breadcrumbs(), site([small], matrix=False))
    assert int((found != 0).sum()) == round(0.9 * 64)
    torch.testing.assert_close(found, breadcrumbs_by_order(small, 64 - round(0.9 * 64), slice(None)))
    assert breadcrumbs_by_order(small, 64 - int(0.9 * 64), slice(-int(0.01 * 64))).abs().max() == 0


def test_breadcrumbs_keep_the_density_before_they_drop_outliers() -> None:
    (change,) = tensors(1, 10, 10)
    found = merge(Breadcrumbs(density=0.9, gamma=0.5), site([change]))
    torch.testing.assert_close(found, breadcrumbs_by_order(change, 0, slice(-10)))
    # Entries of one magnitude are no outliers.
    same = torch.ones(10, 10).where(torch.arange(10) % 2 == 0, -1)
    torch.testing.assert_close(merge(Breadcrumbs(gamma=0.1, density=0.5), site([same])), same)


def test_della_keeps_large_entries_more_often() -> None:
    change = torch.arange(1.0, 9.0).repeat(2000, 1)
    change[:, ::2] *= -1
    share = (merge(DELLA(density=0.6, epsilon=0.3, signs=False), site([change])) != 0).double().mean(0)
    torch.testing.assert_close(share, torch.linspace(0.3, 0.9, 8, dtype=torch.float64), rtol=0, atol=0.05)
    # One column has no rank: mergekit divides 0 by 0 there.
    column = merge(DELLA(), site([torch.ones(1000, 1)]))
    assert float((column != 0).double().mean()) == pytest.approx(0.5, abs=0.06)


def test_rows_are_ranked_as_by_a_stable_sort() -> None:
    for dtype in (torch.float32, torch.float64):
        (x,) = tensors(1, 7, 50, dtype=dtype)
        x[:, ::3] = x[:, 1:2]
        assert ascending(x).equal(x.abs().float().argsort(dim=1, stable=True))


@pytest.mark.parametrize("rule", [TIES, Magnitude, Breadcrumbs, DARE, DARETIES, DELLA])
def test_a_density_of_zero_is_refused_where_peft_gives_nan(rule: Any) -> None:
    with pytest.raises(OptionError, match=rf"{rule.name}: density=0.*greater than 0"):
        rule(density=0)
    assert peft_merge.prune(torch.ones(4), 0.0, "random", rescale=True).isnan().all()


def test_probabilities_out_of_bounds_are_refused() -> None:
    with pytest.raises(OptionError, match=r"della: density=0.1 and epsilon=0.15 .* from -0.05 to 0.25.*below 0.1"):
        DELLA(density=0.1)
    with pytest.raises(OptionError, match=r"from 0.75 to 1.05"):
        DELLA(density=0.9)


def test_factored_changes_are_pruned_as_their_product_is() -> None:
    changes = factored(3, 30, 20, 2)
    exact = merge(Magnitude(density=0.5), site(changes))
    products = peft_merge.magnitude_prune([c.dense() for c in changes], torch.ones(3, dtype=torch.float64), 0.5)
    torch.testing.assert_close(exact, products)
    # PEFT prunes A and B, and merges each by itself.
    B = peft_merge.magnitude_prune([c.B for c in changes], torch.ones(3, dtype=torch.float64), 0.5)
    A = peft_merge.magnitude_prune([c.A for c in changes], torch.ones(3, dtype=torch.float64), 0.5)
    whole = merge(Sum(), site(changes))
    assert (exact - whole).norm() < 0.5 * whole.norm()
    assert (B @ A - whole).norm() > whole.norm()
