"""A run says what its scores are against: the commonest answer, a linear probe, the model before training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_more_tasks import tagged
from tiny import sentences, write_jsonl

from isotune.report.data import RunResult
from isotune.report.others import run_verdict
from isotune.training.evaluation import evaluate
from isotune.training.recipe import build_recipe
from isotune.training.run import train
from isotune.training.tasks.names import TASKS


def run(model: Path, folder: Path, task: str, rows: list[Any], **more: Any) -> dict[str, Any]:
    flags = {
        "model": str(model), "task": task, "data.train": str(write_jsonl(folder / "train.jsonl", rows)),
        "data.test": str(write_jsonl(folder / "test.jsonl", rows[:9])), "output": str(folder / "run"),
        "training.max_steps": 4, "training.report_to": "none", "data.max_length": 32, **more,
    }  # fmt: skip
    return train(build_recipe(None, flags), progress=False).metrics


def said(metrics: dict[str, Any]) -> str:
    _, (headline,), _, _ = run_verdict([RunResult(Path(), "run", metrics, [], {}, "", None)])
    return headline


def test_a_classification_is_against_the_commonest_label_and_the_probe(bert: Path, tmp_path: Path) -> None:
    rows = [*sentences(40, 0), *(row for row in sentences(40, 1) if row["label"] == "animal")]
    metrics = run(bert, tmp_path, "classification", rows)
    share = sum(row["label"] == "animal" for row in rows[:9]) / 9
    assert metrics["test_majority_accuracy"] == share
    assert {"validation_majority_accuracy", "validation_probe_accuracy", "test_probe_accuracy"} <= metrics.keys()
    assert f"the commonest label always: {100 * share:.1f} %; a linear probe: " in said(metrics)
    kept = json.loads((tmp_path / "run" / "baselines.json").read_text())
    assert kept.items() <= metrics.items()


def test_the_probe_is_what_the_untrained_head_scores(bert: Path, tmp_path: Path) -> None:
    metrics = run(bert, tmp_path, "classification", sentences(60, 0), **{"training.learning_rate": 1e-12})
    assert metrics["test_accuracy"] == metrics["test_probe_accuracy"]
    assert metrics["validation_accuracy"] == metrics["validation_probe_accuracy"]


def test_a_language_model_is_against_itself_before_training(llama: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "the cat", "completion": f"sees a {word}"} for word in ("dog", "hen", "fox") * 8]
    metrics = run(llama, tmp_path, "causal-lm", rows)
    before = evaluate(llama, str(tmp_path / "test.jsonl"), task="causal-lm", progress=False)
    assert metrics["test_base_loss"] == pytest.approx(before["loss"], rel=1e-6)
    assert metrics["test_base_perplexity"] > metrics["test_perplexity"]
    assert "(before training: " in said(metrics)


def test_a_resumed_run_keeps_what_was_measured_at_its_start(llama: Path, tmp_path: Path) -> None:
    rows = [{"text": "the cat sees a dog and an owl near the old oak"}] * 12
    metrics = run(llama, tmp_path, "causal-lm", rows, **{"training.save_steps": 2})
    (tmp_path / "run" / "metrics.json").unlink()
    recipe = build_recipe(tmp_path / "run" / "recipe.yaml")
    again = train(recipe, resume=True, progress=False).metrics
    assert again["test_base_loss"] == metrics["test_base_loss"]


def test_numbers_are_against_their_mean_and_tags_against_the_commonest(bert: Path, tmp_path: Path) -> None:
    train_rows, rows = [{"label": n} for n in (1.0, 2.0, 3.0)], [{"label": n} for n in (2.0, 4.0)]
    assert TASKS["regression"].constant(train_rows, rows) == {"mean_rmse": pytest.approx(2**0.5)}
    metrics = run(bert, tmp_path, "token-classification", tagged(40, 0))
    assert 0.3 < metrics["test_majority_accuracy"] < 0.7


def test_without_baselines_none_is_measured(llama: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "x.jsonl", [{"text": "the cat sees a dog"}] * 12)
    flags = {"model": str(llama), "task": "causal-lm", "data.train": str(rows), "output": str(tmp_path / "run"),
             "training.max_steps": 1, "training.report_to": "none"}  # fmt: skip
    metrics = train(build_recipe(None, flags), progress=False, baselines=False).metrics
    assert not any("base" in key for key in metrics)
