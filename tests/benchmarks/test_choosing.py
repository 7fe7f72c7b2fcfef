"""The page on choosing a method says what the committed comparisons say, ties among it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import isotune
from benchmarks import choosing, reading
from benchmarks.standings import worth_of_tuning
from isotune.comparison.results import Row, Summary, lead, ranked
from isotune.intervals import Interval, paired


def row(method: str, values: list[float], **more: Any) -> Row:
    common = {"budget": 1000, "options": {"rank": 4}, "parameters": 1000, "learning_rate": 1e-3}
    return Row(method=method, values=values, **{**common, **more})


def summary(*rows: Row, **more: Any) -> Summary:
    common = {"metric": "accuracy", "baseline": "lora", "seeds": 3, "trials": 4, "task": "classification"}
    for one in rows[1:]:
        one.difference = paired(one.by_seed, rows[0].by_seed)
    return Summary(**{**common, "model": "tiny", "rows": list(rows), **more})


def said_of(found: Summary) -> str:
    return reading.reading(found, found.groups[0])


LORA = row("lora", [0.80, 0.82, 0.81])
TIED = row("hra", [0.83, 0.80, 0.82])
BEHIND = row("oft", [0.70, 0.72, 0.71], edge=True)


def test_the_committed_page_is_current() -> None:
    committed = (choosing.DOCS / choosing.PAGE).read_text()
    assert committed == choosing.page(choosing.DOCS), "docs/choosing.md is stale: run python -m benchmarks.choosing"


def test_what_is_recommended_without_figures_can_do_all_that_is_asked() -> None:
    for found in isotune.methods():
        if found.name in ("hra", "lora"):
            assert found.lora_rank == "rank"
            assert all([found.peft, found.foldable, found.identity_at_start])
            assert {"conv2d", "embedding"} <= set(found.kinds)


def test_methods_whose_difference_may_be_zero_are_ties() -> None:
    assert lead(LORA, TIED, True).mean == pytest.approx(-0.02 / 3)
    assert [(one.method, one.tied) for one in ranked([LORA, BEHIND, TIED], True)] == [
        ("hra", True),
        ("lora", True),
        ("oft", False),
    ]
    said = said_of(summary(LORA, TIED, BEHIND))
    assert "The best mean is `hra`'s, 81.7 ± 3.8." in said
    assert "Not told apart from it over 3 seeds: `lora`." in said
    assert "Told apart, and behind: `oft`." in said
    assert "Told apart from `lora`: better none, worse `oft`; 1 of 2 are not." in said
    assert "end of the range of rates, so perhaps better than shown: `oft`." in said


def test_an_interval_is_shown_by_its_ends_where_it_leaves_the_metrics_range() -> None:
    assert reading.score(Interval(0.98, 0.05), "accuracy") == "98.0 (93.0 to 100.0)"
    assert reading.score(Interval(0.9, 0.05), "accuracy") == "90.0 ± 5.0"
    assert reading.score(Interval(0.02, 0.05), "accuracy", signed=True) == "+2.0 ± 5.0"


def test_one_seed_tells_nothing_apart() -> None:
    said = said_of(summary(row("lora", [0.8]), row("hra", [0.9])))
    assert "nothing is told apart" in said
    assert "±" not in said
    alone = row("hra", [0.9, 0.99], seeds=[0, 7])
    assert lead(alone, LORA, True) == Interval(pytest.approx(0.1), None, [pytest.approx(0.1)]), "one seed in common"


def test_less_is_better_where_the_metric_says_so() -> None:
    low, high = row("hra", [3.1, 3.2, 3.15]), row("lora", [4.1, 4.2, 4.15])
    said = said_of(summary(low, high, metric="perplexity", higher_is_better=False))
    assert "The best mean is `hra`'s, 3.150 ± 0.124." in said
    assert "better `hra`, worse none" in said


def test_the_table_has_differences_and_what_was_forgotten() -> None:
    forgotten = {"probe_accuracy": {"values": [0.9, 0.9, 0.9], "mean": 0.9, "half_width": 0.0}}
    found = summary(
        LORA,
        row("hra", [0.83, 0.84, 0.85], forgetting=forgotten, seconds_per_step=0.25),
        forgetting={"probe_accuracy": {"base": 0.91, "label": "CLINC150"}},
    )
    text = reading.at_budget(found, found.groups[0])
    assert "| hra rank=4 | 1,000 | 0.001 | 84.0 ± 2.5 | +3.0 ± 2.5 | 90.0 ± 0.0 | 0.25 |" in text
    assert "| lora rank=4 | 1,000 | 0.001 | 81.0 ± 2.5 |  |  |  |" in text
    assert "Least forgotten, by probe accuracy: `hra`, 90.0 ± 0.0." in text


def test_tuning_is_compared_with_the_choice_of_a_method() -> None:
    rows = [
        row("lora", [0.8], learning_rates={"0.001": 0.7, "0.01": 0.8}),
        row("hra", [0.8], learning_rates={"0.001": 0.5, "0.01": 0.82, "0.1": None}),
    ]
    assert worth_of_tuning(rows) == pytest.approx((0.21, 0.02))


def test_every_committed_comparison_is_on_the_page(tmp_path: Path) -> None:
    folder = tmp_path / "examples" / "citations"
    folder.mkdir(parents=True)
    frozen = row("frozen", [0.65], budget=None, forgetting={"similarity": Interval.of([1.0])})
    (folder / "summary.json").write_text(summary(LORA, TIED, frozen).model_dump_json())
    (folder / "report.html").write_text("")
    (tmp_path / "examples" / "other").mkdir()
    (tmp_path / "examples" / "other" / "summary.json").write_text("{}")
    text = choosing.page(tmp_path)
    assert "## Classification with tiny: citations" in text
    assert "(examples/citations/report.html)." in text
    assert "The frozen base: 65.0, similarity 1.000." in text
    assert "### 1,000 parameters" in text
    assert "(compare.md)" not in text
