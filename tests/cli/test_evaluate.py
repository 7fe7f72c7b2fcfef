"""`isotune evaluate`: the run's metrics again, other rows, predictions, and mistakes."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import write_jsonl

from isotune.intervals import wilson
from isotune.training import build_recipe, train


def test_a_run_evaluates_to_the_metrics_it_was_left_with(
    command: Callable[..., int], finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("evaluate", finished, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    left = json.loads((finished / "metrics.json").read_text())
    assert found["accuracy"] == left["test_accuracy"]
    assert found["macro_f1"] == left["test_macro_f1"]
    assert found["accuracy_interval"] == left["test_accuracy_interval"] == list(wilson(found["accuracy"], 15))
    assert found["loss"] == pytest.approx(left["test_loss"], rel=1e-5)
    assert found["rows"] == 15


def test_few_labels_are_shown_one_by_one(
    command: Callable[..., int], finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("evaluate", finished) == 0
    shown = capsys.readouterr().out
    labels = json.loads((finished / "metrics.json").read_text())["test_labels"]
    assert "taken for" in shown
    for label, scores in labels.items():
        (line,) = [line for line in shown.splitlines() if f" {label} " in line and f"{scores['f1']:.4f}" in line]
        assert f"{scores['precision']:.4f}" in line
        assert f"{scores['recall']:.4f}" in line


def test_an_adapter_moved_elsewhere_predicts_rows_of_its_own(
    command: Callable[..., int], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = shutil.copytree(finished / "adapter", tmp_path / "moved")
    data = write_jsonl(tmp_path / "new.jsonl", [{"say": "the old cat", "kind": "animal"}] * 3)
    table = tmp_path / "predictions.csv"
    code = command(
        "evaluate", adapter, "--data", data, "--text", "say", "--label", "kind", "--predictions", table, "--json"
    )
    out, err = capsys.readouterr()
    assert code == 0, err
    lines = list(csv.DictReader(table.read_text().splitlines()))
    assert [line["text"] for line in lines] == ["the old cat"] * 3
    assert all(line["prediction"] in ("animal", "plant") for line in lines)
    assert json.loads(out)["accuracy"] == sum(line["prediction"] == "animal" for line in lines) / 3


def test_predictions_of_a_causal_run_are_losses_a_row(
    command: Callable[..., int], llama: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {
        "model": str(llama), "task": "causal-lm", "data.train": str(prompts), "data.test": str(prompts),
        "data.prompt": "question", "data.completion": "answer", "data.max_length": 32, "method.rank": 2,
        "training.max_steps": 2, "output": str(tmp_path / "run"),
    }  # fmt: skip
    train(build_recipe(flags=flags), progress=False)
    assert command("evaluate", tmp_path / "run", "--predictions", tmp_path / "p.jsonl", "--json") == 0
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert len(lines) == 40
    assert all(line["loss"] > 0 for line in lines)
    assert json.loads(capsys.readouterr().out)["perplexity"] > 1


def test_forgetting_is_measured_before_and_after(
    command: Callable[..., int], finished: Path, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [(word, f"{word} the old {animal}") for word in ("sees", "near") for animal in ("cat", "dog", "fox")]
    other = write_jsonl(tmp_path / "other.jsonl", [{"say": text, "kind": word} for word, text in texts])
    flags = ["--forgetting", other, "--forgetting-text", "say"]
    assert command("evaluate", finished, *flags, "--forgetting-label", "kind", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["forgetting_base_similarity"] == 1
    assert 0 < found["forgetting_similarity"] < 1
    assert {found["forgetting_probe_accuracy"], found["forgetting_base_probe_accuracy"]} <= {0.0, 0.5, 1.0}
    assert command("evaluate", finished, *flags) == 2
    assert "forgetting: " in capsys.readouterr().err
    causal = {
        "model": str(llama), "task": "causal-lm", "data.train": str(other), "data.text": "say", "data.max_length": 16,
        "data.validation": 0.3, "method.rank": 2, "training.max_steps": 1, "output": str(tmp_path / "run"),
    }  # fmt: skip
    train(build_recipe(flags=causal), progress=False)
    assert command("evaluate", tmp_path / "run", *flags, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["forgetting_perplexity"] != found["forgetting_base_perplexity"] > 1


MISTAKES = {
    "no such folder": (["nowhere"], "no run or adapter folder at nowhere"),
    "not an adapter": (["{tmp}"], "has no task.json"),
    "unknown label": (["{run}", "--data", "{unseen}"], "has the label 'rock'"),
    "unknown column": (["{run}", "--text", "txt"], "no column 'txt'"),
    "another table": (["{run}", "--predictions", "{tmp}/x.xlsx"], "name a .csv or a .jsonl file"),
    "no folder for the table": (["{run}", "--predictions", "{tmp}/no/x.csv"], "no such folder"),
    "no rows named": (["{moved}"], "--data FILE"),
    "another base": (["{run}", "--model", "minilm"], "isotune:"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gives_one_message_and_exit_code_2(
    command: Callable[..., int],
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    mistake: str,
) -> None:
    arguments, message = MISTAKES[mistake]
    unseen = write_jsonl(tmp_path / "unseen.jsonl", [{"text": "cat", "label": "rock"}])
    moved = shutil.copytree(finished / "adapter", tmp_path / "moved")
    places = {"run": finished, "tmp": tmp_path, "unseen": unseen, "moved": moved}
    assert command("evaluate", *[argument.format(**places) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert out == ""
    assert len([line for line in err.splitlines() if line.startswith("isotune: ")]) == 1
