"""The laws of merging, for every registered rule."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from isotune.linalg.change import Change, dense, scaled
from isotune.linalg.low_rank import Factored
from isotune.merging.contract import Aligned, Rule
from isotune.merging.registry import rule_class, rule_names
from isotune.merging.run import Run
from laws.exemptions import EXEMPT

SHAPES = {"a": (12, 9), "b": (8, 16), "c": (10, 10)}
RANKS = (3, 1, 2)
WEIGHTS = (1.0, 0.5, 2.0)


@pytest.fixture(params=[name for name in rule_names() if issubclass(rule_class(name), Rule)])
def rule(request: pytest.FixtureRequest) -> type[Rule]:
    found = rule_class(request.param)
    law = request.node.name.partition("[")[0]
    if law in found.exempt:
        pytest.skip(f"{EXEMPT}{found.exempt[law]}")
    return found


def models_of(rule: type[Rule]) -> int:
    return min(len(RANKS), rule.models[1] or len(RANKS))


def sites_for(
    rule: type[Rule],
    order: Sequence[int] | None = None,
    weights: Sequence[float] = WEIGHTS,
    as_dense: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> list[Aligned]:
    """The same drawn changes every time; the models in the given order."""
    generator = torch.Generator().manual_seed(7)
    sites = []
    order = range(models_of(rule)) if order is None else order
    for path, (m, n) in SHAPES.items():
        ranks = [RANKS[0] if rule.equal_ranks else rank for rank in RANKS]
        changes: list[Change] = [
            Factored(
                torch.randn(m, r, generator=generator, dtype=torch.float64).to(dtype),
                torch.randn(r, n, generator=generator, dtype=torch.float64).to(dtype),
            )
            for r in ranks
        ]
        if as_dense:
            changes = [dense(change) for change in changes]
        statistics = [torch.rand(m, n, generator=generator, dtype=torch.float64).to(dtype) for _ in ranks]
        sites.append(
            Aligned(
                path,
                tuple("xyz"[i] for i in order),
                tuple(changes[i] for i in order),
                tuple(weights[i] for i in order),
                statistics=tuple(statistics[i] for i in order) if rule.statistic else (),
                seed=seed,
            )
        )
    return sites


def merged(rule: Rule, sites: list[Aligned]) -> dict[str, Change]:
    run = Run(rule, lambda: iter(sites))
    changes = {site.path: change for site, change in run}
    return {path: scaled(change, run.factor) for path, change in changes.items()}


def assert_same(one: dict[str, Change], other: dict[str, Change], tolerance: float = 1e-9) -> None:
    assert one.keys() == other.keys()
    for path in one:
        torch.testing.assert_close(dense(one[path]), dense(other[path]), rtol=tolerance, atol=tolerance)


def test_one_model_with_weight_one_is_itself(rule: type[Rule]) -> None:
    if rule.models[0] > 1:
        pytest.skip(f"{rule.name} takes {rule.models[0]} models or more")
    sites = sites_for(rule, order=[0])
    assert_same(merged(rule(**rule.neutral), sites), {site.path: site.changes[0] for site in sites})


def test_order_does_not_matter(rule: type[Rule]) -> None:
    if not rule.symmetric:
        pytest.skip(f"{rule.name} depends on the order, and says so")
    first = merged(rule(), sites_for(rule))
    for order in itertools.permutations(range(models_of(rule))):
        assert_same(merged(rule(), sites_for(rule, order)), first)


def test_rank_is_at_most_the_sum_of_ranks(rule: type[Rule]) -> None:
    if not rule.exact_rank:
        pytest.skip(f"{rule.name} works on single entries, and says so")
    for site, (_, change) in zip(sites_for(rule), merged(rule(), sites_for(rule)).items(), strict=True):
        limit = sum(own.rank for own in site.changes if isinstance(own, Factored))
        assert isinstance(change, Factored)
        assert change.rank <= limit


def test_factored_and_dense_inputs_give_the_same(rule: type[Rule]) -> None:
    assert_same(merged(rule(), sites_for(rule)), merged(rule(), sites_for(rule, as_dense=True)), 1e-7)


def test_threads_do_not_matter(rule: type[Rule]) -> None:
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(merged(rule(), sites_for(rule, dtype=torch.float32)))
    finally:
        torch.set_num_threads(threads)
    assert_same(found[0], found[1], 1e-5)


def test_seeds_fix_what_is_drawn(rule: type[Rule]) -> None:
    first = merged(rule(), sites_for(rule))
    assert_same(first, merged(rule(), sites_for(rule)), 0.0)
    other = merged(rule(), sites_for(rule, seed=1))
    differs = any(not dense(first[path]).equal(dense(other[path])) for path in first)
    assert differs == rule.random


def test_dtype_is_kept(rule: type[Rule]) -> None:
    for dtype in (torch.float32, torch.float64):
        for change in merged(rule(), sites_for(rule, dtype=dtype)).values():
            assert dense(change).dtype == dtype


def test_inputs_stay_as_they_were(rule: type[Rule]) -> None:
    sites = sites_for(rule)
    before = [[dense(change).clone() for change in site.changes] for site in sites]
    merged(rule(), sites)
    for site, kept in zip(sites, before, strict=True):
        assert all(dense(change).equal(old) for change, old in zip(site.changes, kept, strict=True))


def test_models_that_left_a_weight_alone(rule: type[Rule]) -> None:
    if rule.equal_ranks:
        pytest.skip(f"{rule.name} takes equal ranks only, and says so")
    sites = [_without(site, index % len(site.changes)) for index, site in enumerate(sites_for(rule))]
    for change in merged(rule(), sites).values():
        assert torch.isfinite(dense(change)).all()
    nothing = [
        Aligned(s.path, s.names, tuple(_zero(c) for c in s.changes), s.weights, statistics=s.statistics)
        for s in sites
    ]
    for change in merged(rule(), nothing).values():
        assert dense(change).abs().max() == 0


def test_tensors_that_are_no_matrices(rule: type[Rule]) -> None:
    generator = torch.Generator().manual_seed(3)
    count = models_of(rule)
    changes = [torch.randn(6, generator=generator) for _ in range(count)]
    statistics: Any = tuple(torch.rand(6, generator=generator) for _ in range(count)) if rule.statistic else ()
    site = Aligned("bias", tuple("xyz"[:count]), tuple(changes), WEIGHTS[:count], False, statistics)
    found = merged(rule(), [site])["bias"]
    assert isinstance(found, Tensor)
    assert found.shape == (6,)
    assert torch.isfinite(found).all()


def _zero(change: Change) -> Change:
    return Factored(change.B[:, :0], change.A[:0]) if isinstance(change, Factored) else torch.zeros_like(change)


def _without(site: Aligned, index: int) -> Aligned:
    changes = tuple(_zero(change) if i == index else change for i, change in enumerate(site.changes))
    return Aligned(site.path, site.names, changes, site.weights, statistics=site.statistics, seed=site.seed)
