"""The search for a learning rate: even at first, then where the results point; the same whoever runs it."""

from __future__ import annotations

import math

from isotune.comparison.plan import Cell
from isotune.comparison.rates import tried

CELL = Cell("lora", {"name": "lora", "rank": 4}, 1000, 1024, 1e-3)
SPAN = (0.1, 10.0)


def searched(trials: int, optimum: float, diverges_above: float = math.inf) -> dict[float, float | None]:
    scores: dict[float, float | None] = {}
    while missing := tried(CELL, SPAN, trials, scores)[1]:
        for rate in missing:
            scores[rate] = None if rate > diverges_above else -abs(math.log(rate / optimum))
    return scores


def test_the_first_two_thirds_are_an_even_grid_with_both_ends_and_the_methods_own_rate_is_next() -> None:
    rates, missing = tried(CELL, SPAN, 6, {})
    assert rates == missing == [1e-4, 4.64e-4, 2.15e-3, 1e-2, 1e-3]


def test_the_methods_own_rate_is_always_tried_where_the_span_has_it() -> None:
    for trials in range(1, 13):
        assert 1e-3 in searched(trials, 3e-3)
    assert tried(CELL, (1.5, 10.0), 6, {})[0] == [1.5e-3, 2.82e-3, 5.31e-3, 1e-2]
    assert tried(CELL, (0.1, 10.0), 2, {})[0] == [1e-3, 1e-2]


def test_one_trial_is_the_methods_own_rate() -> None:
    assert tried(CELL, SPAN, 1, {}) == ([1e-3], [1e-3])


def test_every_method_gets_as_many_trials_within_the_span() -> None:
    for trials in (1, 2, 3, 6, 8, 12):
        found = searched(trials, 3e-3)
        assert len(found) == trials
        assert all(1e-4 <= rate <= 1e-2 * 1.06 for rate in found)


def test_the_search_ends_where_the_results_point() -> None:
    for optimum in (3e-4, 4e-3):
        found = searched(12, optimum)
        best = max(found, key=lambda rate: found[rate] or -math.inf)
        assert abs(math.log(best / optimum)) < 0.5 * math.log(100) / 7


def test_rates_that_diverged_are_shunned_and_counted() -> None:
    found = searched(9, 1e-3, diverges_above=3e-3)
    assert len(found) == 9
    later = list(found)[6:]
    assert sum(rate > 3e-3 for rate in later) < len(later)


def test_the_next_rate_follows_from_the_results_in_whatever_order_they_came() -> None:
    scores = {rate: -abs(math.log(rate / 2e-3)) for rate in (1e-4, 4.64e-4, 2.15e-3, 1e-2, 1e-3)}
    turned = dict(reversed(scores.items()))
    assert tried(CELL, SPAN, 6, scores) == tried(CELL, SPAN, 6, turned)
    assert tried(CELL, SPAN, 6, {**scores, 0.5: 1.0})[0][:4] == list(scores)[:4]
