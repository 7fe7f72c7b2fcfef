"""`isotune report`, and the pages that train and merge leave beside their results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from sweeps import row, summary, write_comparison
from tiny import write_recipe
from transformers import AutoModel

import isotune
from isotune import LoRA
from isotune.cli.report import write_beside
from support import adapted

Command = Callable[..., int]


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    rows = [row("hra", [0.84, 0.86, 0.85], 1000), row("lora", [0.86, 0.83, 0.84], 1000)]
    return write_comparison(tmp_path / "sweep", summary(rows))


def test_the_verdict_is_printed_and_the_page_written(
    command: Command, comparison: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("report", comparison, "-o", tmp_path / "pages" / "report.html") == 0
    text, err = capsys.readouterr()
    assert "hra and lora cannot be told apart" in text
    assert "report.html: written" in err
    assert (tmp_path / "pages" / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_json_is_the_verdict_alone(
    command: Command, comparison: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("report", comparison, "--output", tmp_path / "r.html", "--no-diagnose", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["path"] == str(tmp_path / "r.html")
    assert found["verdicts"][0]["ranking"][0]["tied"][0]["method"] == "lora"


def test_a_mistake_gives_one_message_and_exit_code_2(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert command("report", tmp_path / "empty", "-o", tmp_path / "r.html") == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "empty is empty; a report needs a comparison, a run or an adapter that is finished" in err
    assert not (tmp_path / "r.html").exists()


def test_train_leaves_a_report_unless_told_not_to(
    command: Command, bert: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", bert, rows, tmp_path / "run", max_steps=6, save_steps=6)
    assert command("train", recipe, "--set", "head=random", "--json") == 0
    out, err = capsys.readouterr()
    metrics = json.loads(out)
    page = tmp_path / "run" / "report.html"
    assert f"{page}: the report" in err
    text = page.read_text()
    assert f"test accuracy {100 * metrics['test_accuracy']:.1f} %" in text
    assert "was not measured for this page; isotune report run does." in text
    assert '"training loss"' in text
    assert command("train", recipe, "--set", "head=random", "--overwrite", "--no-report") == 0
    assert not page.exists()


def test_merge_leaves_a_report_with_what_the_rank_cut_off(
    command: Command, bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [
        isotune.save(adapted(AutoModel.from_pretrained(bert), LoRA(rank=2), ["query"], seed=seed), tmp_path / name)
        for seed, name in enumerate("ab")
    ]
    assert command("merge", *folders, "--rank", 2, "--out", tmp_path / "merged", "--json") == 0
    merged = json.loads(capsys.readouterr().out)
    assert merged["error"] > 0.01
    assert set(merged["norms"]) == set(merged["errors"])
    assert all(norm > 0 for norm in merged["norms"].values())
    text = (tmp_path / "merged" / "report.html").read_text()
    assert "2 models merged by sum; writing it at its rank lost" in text
    assert "norm of the merged change" in text
    assert command("merge", *folders, "--out", tmp_path / "merged", "--no-report") == 0
    assert not (tmp_path / "merged" / "report.html").exists()
    assert command("merge", *folders, "--rule", "rmm", "--out", tmp_path / "both") == 0
    assert "2 adapters compressed by rmm" in (tmp_path / "both" / "report.html").read_text()


def test_a_report_that_fails_never_fails_what_was_finished(
    comparison: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (comparison / "summary.json").write_text("{")
    write_beside(comparison, True)
    assert "isotune: no report was written: " in capsys.readouterr().err

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a mistake in the report")

    monkeypatch.setattr("isotune.report.page.build", broken)
    write_beside(comparison, True)
    assert "no report was written, ZeroDivisionError: a mistake in the report" in capsys.readouterr().err
    monkeypatch.setattr("isotune.report.page.has_plotly", lambda: False)
    write_beside(comparison, True)
    assert capsys.readouterr().err == ""
