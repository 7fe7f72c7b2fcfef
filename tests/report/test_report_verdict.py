"""The verdict: what is claimed, and what is not, from which numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sweeps import row, summary

from isotune.comparison.results import Summary
from isotune.intervals import Interval
from isotune.report.data import Comparison
from isotune.report.verdict import Verdict, compared

CLEAR = {"hra": [0.84, 0.86, 0.85], "lora": [0.80, 0.82, 0.81], "ia3": [0.70, 0.72, 0.71]}
NOISY = {"hra": [0.84, 0.86, 0.85], "lora": [0.86, 0.83, 0.84], "ia3": [0.70, 0.72, 0.71]}


def verdict(rows: list[dict[str, Any]], **more: Any) -> Verdict:
    return compared(Comparison(Path("x"), "x", Summary.model_validate(summary(rows, **more)), [], None))


def scored(scores: dict[str, list[float]], budget: int | None = 1000, **more: Any) -> list[dict[str, Any]]:
    return [row(method, values, budget, **more) for method, values in scores.items()]


def test_a_lead_whose_paired_interval_excludes_zero_is_best() -> None:
    (said,) = verdict(scored(CLEAR)).headlines
    assert said.startswith("At 1,000 parameters hra is best, 85.0 ± 2.5 %, and ahead of every other method")


def test_a_lead_whose_paired_interval_holds_zero_is_none() -> None:
    (said,) = verdict(scored(NOISY)).headlines
    assert "hra has the best mean" in said
    assert "cannot be told apart from lora; ia3 is clearly behind" in said


def test_two_that_cannot_be_told_apart_are_said_so_plainly() -> None:
    (said,) = verdict(scored({name: NOISY[name] for name in ("hra", "lora")})).headlines
    assert "hra and lora cannot be told apart" in said
    assert "the paired interval of its lead over lora holds zero" in said


def test_pairing_finds_a_difference_that_the_intervals_of_the_means_hide() -> None:
    scores = {"hra": [0.71, 0.81, 0.91], "lora": [0.70, 0.80, 0.90]}
    found = verdict(scored(scores))
    assert Interval.of(scores["hra"]).half_width > 0.2
    assert "hra is best" in found.headlines[0]


def test_seeds_are_paired_by_their_number_and_not_by_their_order() -> None:
    rows = [
        row("hra", [0.91, 0.81, 0.71], 1000, seeds=[3, 2, 1]),
        row("lora", [0.70, 0.80, 0.90], 1000, seeds=[1, 2, 3]),
    ]
    assert "hra is best" in verdict(rows).headlines[0]
    assert "cannot be told apart" in verdict([{**r, "seeds": []} for r in rows]).headlines[0]


def test_one_seed_claims_nothing() -> None:
    found = verdict(scored({"hra": [0.9], "lora": [0.5]}))
    assert "nobody can say whether that is luck" in found.headlines[0]
    assert any("One seed gives no interval" in said for said in found.cautions)
    assert not any("clearly" in said for said in (*found.headlines, *found.findings))


def test_of_a_loss_the_lowest_is_best() -> None:
    scores = {"hra": [2.10, 2.12, 2.11], "lora": [2.30, 2.33, 2.31]}
    found = verdict(scored(scores), metric="loss", higher_is_better=False)
    assert "hra is best, 2.110 ± 0.025, and ahead" in found.headlines[0]
    assert found.ranking[0]["beaten"][0]["behind"]["mean"] == pytest.approx(0.2033, abs=1e-3)


def test_each_budget_has_its_headline_and_the_cheapest_of_the_best_is_named() -> None:
    small, large = scored(NOISY, 1000), scored({m: [v + 0.001 for v in vs] for m, vs in NOISY.items()}, 2000)
    found = verdict([*large, *small])
    assert [said[:15] for said in found.headlines] == ["At 1,000 parame", "At 2,000 parame"]
    assert any(
        "the cheapest that cannot be told apart from it is" in said and "1,000" in said for said in found.findings
    )


@pytest.mark.parametrize(
    ("full", "said"),
    [
        ([0.94, 0.96, 0.95], "is better than hra at 1,000 by 10.0 ± 0.0 points"),
        ([0.74, 0.76, 0.75], "is worse than hra at 1,000 by 10.0 ± 0.0 points"),
        ([0.86, 0.83, 0.855], "cannot be told apart from hra at 1,000"),
        ([0.95], "one seed cannot say whether that differs"),
    ],
)  # fmt: skip
def test_full_fine_tuning_is_judged_by_its_paired_interval(full: list[float], said: str) -> None:
    found = verdict([*scored(CLEAR), row("full", full, None, parameters=500_000)])
    (finding,) = [f for f in found.findings if f.startswith("Full fine-tuning")]
    assert said in finding
    assert "with 500 times the parameters" in finding


def test_methods_that_do_not_beat_the_frozen_base_are_named() -> None:
    found = verdict([*scored(CLEAR), row("frozen", [0.708], None, parameters=0)])
    (finding,) = [f for f in found.findings if "frozen base" in f]
    assert "ia3 at 1,000 cannot be shown to improve on it" in finding
    assert "hra" not in finding
    better = verdict([*scored(CLEAR), row("frozen", [0.5], None, parameters=0)])
    assert any("every method clearly improves on it" in said for said in better.findings)


def test_what_makes_the_result_doubtful_is_said() -> None:
    rows = [*scored(CLEAR, edge=True), row("oft", [], 1000, mean=None, half_width=None)]
    units = {"planned": 20, "done": 15, "failed": 2}
    said = " ".join(verdict(rows, units=units, without_result=["vera at 1,000: diverged"]).cautions)
    assert "not finished: 15 of 20 units" in said
    assert "2 units failed" in said
    assert "hra at 1,000, lora at 1,000 and ia3 at 1,000 lies at an end of the range" in said
    assert "No results for oft at 1,000 and vera at 1,000: diverged" in said
    assert "3 seeds give wide intervals" in said


def test_forgetting_names_who_keeps_most_and_least() -> None:
    declared = {"probe_accuracy": {"base": 0.9, "higher_is_better": True, "label": "linear probe"},
                "perplexity": {"base": 5.0, "higher_is_better": False, "label": "perplexity of text"}}  # fmt: skip
    rows = scored(CLEAR)
    for own, level in zip(rows, (0.88, 0.85, 0.80), strict=True):
        own["forgetting"] = {"probe_accuracy": {"values": [level], "mean": level, "half_width": 0.01},
                             "perplexity": {"values": [level], "mean": 10 * level, "half_width": 5.0}}  # fmt: skip
    said = [f for f in verdict(rows, forgetting=declared).findings if f.startswith("Forgetting")]
    assert (
        "hra at 1,000 keeps most, 88.0 ± 1.0 %, and ia3 at 1,000 least, 80.0 ± 1.0 % (the base itself: 90.0 %)."
        in said[0]
    )
    assert "ia3 at 1,000 keeps most, 8.00" in said[1]
    assert said[1].endswith("their intervals overlap.")


def test_the_ranking_for_machines_says_the_same() -> None:
    (found,) = verdict(scored(NOISY)).ranking
    assert found["budget"] == 1000
    assert found["best"]["method"] == "hra"
    assert [one["method"] for one in found["tied"]] == ["lora"]
    assert [one["method"] for one in found["beaten"]] == ["ia3"]


def test_only_references_are_no_ranking() -> None:
    found = verdict([row("full", [0.8, 0.9], None), row("frozen", [0.5], None)])
    assert "no adapter has results yet" in found.headlines[0]
    assert found.ranking == []
