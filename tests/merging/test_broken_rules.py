"""Every law of merging fails for a rule that breaks it, and for no such reason for one that is right."""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

import pytest
import torch

from isotune.linalg.change import Change, dense, scaled, total
from isotune.linalg.low_rank import Factored
from isotune.merging.contract import Aligned, Rule
from merging import test_every_rule as laws

_calls = itertools.count(1)


class Right(Rule):
    """The weighted sum."""

    name: ClassVar[str] = "right"

    def merge(self, site: Aligned, surveyed: Any) -> Change:
        return total(site.changes, site.weights)


class Shrinks(Right):
    def merge(self, site: Aligned, surveyed: Any) -> Change:
        return scaled(super().merge(site, surveyed), 0.9)


class TakesTheFirst(Right):
    def merge(self, site: Aligned, surveyed: Any) -> Change:
        return site.changes[0]


class AddsRank(Right):
    def merge(self, site: Aligned, surveyed: Any) -> Change:
        found = super().merge(site, surveyed)
        if not isinstance(found, Factored):
            return found
        return Factored(torch.cat([found.B, found.B[:, :1]], 1), torch.cat([found.A, found.A[:1]]))


class LooksAtTheForm(Right):
    def merge(self, site: Aligned, surveyed: Any) -> Change:
        return scaled(super().merge(site, surveyed), 1.0 if site.factored else 1.01)


class LooksAtThreads(Right):
    def merge(self, site: Aligned, surveyed: Any) -> Change:
        return scaled(super().merge(site, surveyed), float(torch.get_num_threads()))


class NeverTheSame(Right):
    random: ClassVar[bool] = True

    def merge(self, site: Aligned, surveyed: Any) -> Change:
        return scaled(super().merge(site, surveyed), float(next(_calls)))


class DrawsNothing(Right):
    random: ClassVar[bool] = True


class DrawsInSecret(Right):
    def merge(self, site: Aligned, surveyed: Any) -> Change:
        return scaled(super().merge(site, surveyed), float(torch.rand((), generator=site.generator("x"))))


class Widens(Right):
    def merge(self, site: Aligned, surveyed: Any) -> Change:
        return dense(super().merge(site, surveyed)).double()


class WritesIntoItsInputs(Right):
    def merge(self, site: Aligned, surveyed: Any) -> Change:
        for change in site.changes:
            (change.B if isinstance(change, Factored) else change).mul_(0.5)
        return super().merge(site, surveyed)


class DividesByTheNorm(Right):
    def merge(self, site: Aligned, surveyed: Any) -> Change:
        found = dense(super().merge(site, surveyed))
        return found / found.norm()


class MakesMatrices(Right):
    def merge(self, site: Aligned, surveyed: Any) -> Change:
        return torch.atleast_2d(dense(super().merge(site, surveyed)))


BROKEN: dict[str, list[type[Rule]]] = {
    "test_one_model_with_weight_one_is_itself": [Shrinks],
    "test_order_does_not_matter": [TakesTheFirst],
    "test_rank_is_at_most_the_sum_of_ranks": [AddsRank, Widens],
    "test_factored_and_dense_inputs_give_the_same": [LooksAtTheForm],
    "test_threads_do_not_matter": [LooksAtThreads],
    "test_seeds_fix_what_is_drawn": [NeverTheSame, DrawsNothing, DrawsInSecret],
    "test_dtype_is_kept": [Widens],
    "test_inputs_stay_as_they_were": [WritesIntoItsInputs],
    "test_models_that_left_a_weight_alone": [DividesByTheNorm],
    "test_tensors_that_are_no_matrices": [MakesMatrices],
}


@pytest.mark.parametrize(("law", "rule"), [(law, rule) for law, found in BROKEN.items() for rule in found])
def test_a_law_fails_for_a_rule_that_breaks_it(law: str, rule: type[Rule]) -> None:
    getattr(laws, law)(Right)
    with pytest.raises(AssertionError):
        getattr(laws, law)(rule)


def test_every_law_has_a_broken_twin() -> None:
    assert {name for name in vars(laws) if name.startswith("test_")} == BROKEN.keys()
