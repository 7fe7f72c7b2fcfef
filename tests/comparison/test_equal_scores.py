"""Forgetting at equal scores: found on made-up curves, and measured along real runs without a trace on them."""

from __future__ import annotations

from pathlib import Path

import pytest

from isotune.comparison import build_comparison, compare
from isotune.comparison.equal_scores import equal_scores
from isotune.comparison.results import EqualScore, Line, Row, Summary
from isotune.comparison.store import Store
from isotune.report.data import collect
from isotune.report.page import render
from isotune.report.verdict import judge


def line(method: str, seed: int, scores: list[float], kept: list[float], steps: int | None = None) -> Line:
    """A seed's run that was measured at steps 0, 10, 20, ..."""
    curve = [
        {"step": 10 * index, "eval_accuracy": score, "eval_forgetting_similarity": similarity}
        for index, (score, similarity) in enumerate(zip(scores, kept, strict=True))
    ]
    last = {"steps": 10 * (len(scores) - 1), "validation_accuracy": scores[-1], "forgetting_similarity": kept[-1]}
    return Line(
        unit=f"{method}-{seed}", kind="seed", method=method, budget=100, seed=seed, status="done", curve=curve,
        metrics=last | ({"steps": steps} if steps is not None else {}),
    )  # fmt: skip


def found(*lines: Line) -> dict[str, EqualScore]:
    seeds = {line.method: [one.seed or 0 for one in lines if one.method == line.method] for line in lines}
    rows = [Row(method=name, budget=100, seeds=own, values=[0.5] * len(own)) for name, own in seeds.items()]
    return {row.method: at for row, at in equal_scores(rows, lines, "accuracy", higher=True)}


def test_the_score_is_the_worst_end_and_what_was_kept_lies_between_two_measurements() -> None:
    at = found(line("slow", 1, [0.5, 0.6, 0.7], [1.0, 0.9, 0.8]), line("fast", 1, [0.5, 0.8, 0.9], [1.0, 0.7, 0.1]))
    assert at["slow"].score == at["fast"].score == 0.7
    assert (at["slow"].steps.mean, at["slow"].forgetting["similarity"].mean) == (20, 0.8)
    assert at["fast"].steps.mean == pytest.approx(20 / 3)
    assert at["fast"].forgetting["similarity"].mean == pytest.approx(1 - 0.3 * 2 / 3)
    assert (at["slow"].beyond, at["fast"].beyond) == (0, 0)


def test_seeds_that_never_come_to_the_score_or_begin_past_it_are_counted() -> None:
    at = found(
        line("slow", 1, [0.5, 0.58], [1.0, 0.9]),
        line("slow", 2, [0.5, 0.62], [1.0, 0.8]),
        line("ahead", 1, [0.7, 0.8], [0.95, 0.5]),
    )
    assert at["slow"].score == pytest.approx(0.6)
    assert at["slow"].beyond == 1
    assert at["slow"].forgetting["similarity"].values == pytest.approx([0.9, 1 - 0.2 * 5 / 6])
    assert (at["ahead"].beyond, at["ahead"].forgetting["similarity"].values) == (1, [0.95])


def test_the_end_of_a_run_counts_where_no_validation_fell_on_it() -> None:
    short = line("slow", 1, [0.5, 0.6], [1.0, 0.9], steps=15)
    short.metrics |= {"validation_accuracy": 0.7, "forgetting_similarity": 0.6}
    at = found(short)["slow"]
    assert (at.score, at.steps.mean, at.forgetting["similarity"].mean) == (0.7, 15, 0.6)


def test_rows_measured_at_their_end_alone_are_left_out() -> None:
    bare = line("slow", 1, [0.5, 0.6], [1.0, 0.9])
    bare.curve = [{"step": 10, "eval_accuracy": 0.6}]
    assert found(bare) == {}


def run(model: Path, rows: Path, output: Path, points: int) -> Summary:
    made = build_comparison(
        flags={
            "model": str(model), "task": "causal-lm", "data.train": str(rows), "data.test": str(rows),
            "data.prompt": "question", "data.completion": "answer", "data.max_length": 32, "targets": "all-linear",
            "training.max_steps": 4, "training.per_device_train_batch_size": 8, "compare.methods": "hra,lora",
            "compare.budgets": "2k", "compare.seeds": 1, "compare.trials": 1, "compare.full": False,
            "compare.cost_steps": 0, "compare.forgetting": {"test": str(rows), "text": "question", "points": points},
            "output": str(output),
        }
    )  # fmt: skip
    return compare(made, progress=False)


def scores(summary: Summary) -> dict[str, list[float]]:
    return {row.method: [*row.values, *row.forgetting["perplexity"].values] for row in summary.rows}


def test_measuring_along_the_way_leaves_no_trace_and_is_drawn(llama: Path, prompts: Path, tmp_path: Path) -> None:
    plain, along = run(llama, prompts, tmp_path / "plain", 0), run(llama, prompts, tmp_path / "along", 2)
    for method, found in scores(along).items():
        assert found == pytest.approx(scores(plain)[method], rel=1e-4)
    assert all(row.forgetting_at is None for row in plain.rows)
    rows = {row.method: row for row in along.rows}
    assert rows["frozen"].forgetting_at is None
    (hra,) = (one for one in Store(tmp_path / "along").lines().values() if (one.method, one.kind) == ("hra", "seed"))
    assert rows["hra"].forgetting_at.score == rows["lora"].forgetting_at.score >= hra.metrics["validation_loss"]
    curve = [entry for entry in hra.curve if "eval_loss" in entry]
    assert [entry["step"] for entry in curve] == [0, 2, 4]
    assert curve[0]["eval_forgetting_perplexity"] == pytest.approx(along.forgetting["perplexity"].base)
    assert curve[2]["eval_forgetting_perplexity"] == pytest.approx(rows["hra"].forgetting["perplexity"].mean)
    collected = collect([tmp_path / "along"])
    verdicts = judge(collected)
    assert sum(finding.startswith("At an equal validation loss") for finding in verdicts[0].findings) == 1
    page = render(collected, verdicts)
    assert "Forgetting at equal scores" in page
    assert "forgetting-along-perplexity-2000" in page
