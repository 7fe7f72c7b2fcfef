"""Folders are read, or refused in one clear message."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from run_folders import write_run
from sweeps import diagnosis, row, summary, write_comparison

from isotune.errors import CheckpointError, IsotuneError
from isotune.report.data import Collected, collect
from isotune.report.diagnosing import add_diagnoses
from isotune.report.page import build


def write_adapter(folder: Path, merged: bool = False) -> Path:
    """A folder that looks like an adapter's from outside."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "models/base"})
    )
    if merged:
        record = {"rule": "ties", "options": {"density": 0.2}, "models": {"a": 1.0, "b": 0.5},
                  "ranks": {"layer.0.query": 4, "layer.1.query": 4}, "error": 0.031, "seconds": 1.0,
                  "errors": {"layer.0.query": 0.02, "layer.1.query": 0.04}, "notes": [],
                  "norms": {"layer.0.query": 1.5, "layer.1.query": 2.5}}  # fmt: skip
        (folder / "merge.json").write_text(json.dumps(record))
    return folder


def _half_line(folder: Path) -> None:
    (folder / "results.jsonl").write_text('{"unit": "a", "kind"\n{"unit": "b"}\n')


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (lambda folder: folder.rmdir(), "does not exist"),
    "empty": (lambda folder: None, "is empty"),
    "foreign": (lambda folder: (folder / "thesis.txt").write_text("x"), "holds no comparison"),
    "unfinished comparison": (
        lambda f: (f / "results.jsonl").write_text("{}\n"),
        "has no summary.json yet, and none can be made",
    ),
    "damaged summary": (lambda folder: (folder / "summary.json").write_text('{"rows": ['), "the file is damaged"),
    "a list as summary": (lambda folder: (folder / "summary.json").write_text("[]"), "is no summary of a comparison"),
    "no rows": (lambda folder: (folder / "summary.json").write_text("{}"), "it has no metric"),
    "no results": (lambda folder: write_comparison(folder, summary([])), "no unit of the comparison has finished"),
    "a row without a method": (
        lambda folder: write_comparison(folder, summary([row("hra", [0.8])]) | {"rows": [{"values": [1.0]}]}),
        "row 1 has no method",
    ),
    "half a line": (
        lambda folder: (write_comparison(folder, summary([row("hra", [0.8])])), _half_line(folder)),
        "results.jsonl, line 1, is no result of isotune compare",
    ),
    "unfinished run": (lambda folder: write_run(folder / "run", metrics=False), "is not finished: isotune train"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_folder_gives_one_clear_message_and_no_page(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    damage, message = BROKEN[kind]
    damage(folder)
    target = folder / "run" if (folder / "run").is_dir() else folder
    with pytest.raises(IsotuneError) as refused:
        build([target], tmp_path / "report.html")
    assert message in str(refused.value)
    assert str(target) in str(refused.value)
    assert not (tmp_path / "report.html").exists()


def test_nothing_and_a_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(IsotuneError, match="nothing to report on"):
        collect([])
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(IsotuneError, match="is a file"):
        collect([tmp_path / "a.json"])


def test_the_last_line_may_be_cut_short_by_a_crash(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "c", summary([row("hra", [0.8, 0.9])]))
    (folder / "results.jsonl").write_text(
        '{"unit": "a", "kind": "seed", "method": "hra", "status": "done"}\n{"unit": "b", "ki'
    )
    (found,) = collect([folder]).comparisons
    assert [unit.unit for unit in found.units] == ["a"]


def test_every_kind_of_folder_is_recognised_and_named_apart(tmp_path: Path) -> None:
    comparison = write_comparison(tmp_path / "c", summary([row("hra", [0.8, 0.9])]))
    runs = [write_run(tmp_path / name / "run", method) for name, method in (("one", "hra"), ("two", "full"))]
    adapter, merged = write_adapter(tmp_path / "adapter"), write_adapter(tmp_path / "merged", merged=True)
    found = collect([comparison, *runs, adapter, merged])
    assert [one.name for one in found.runs] == ["one/run", "two/run"]
    assert [one.weights.name for one in found.runs if one.weights] == ["adapter", "model"]
    assert found.runs[0].recipe["method"]["name"] == "hra"
    assert len(found.runs[0].history) == 20
    assert [(one.kind, one.merge is not None) for one in found.weights] == [("adapter", False), ("adapter", True)]


def test_a_run_without_history_has_its_last_checkpoints(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", history=False)
    for step in (5, 10):
        (run / f"checkpoint-{step}").mkdir()
        state = {"log_history": [{"step": step, "loss": 0.5}]}
        (run / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    assert collect([run]).runs[0].history == [{"step": 10, "loss": 0.5}]


def test_the_first_seed_of_each_row_is_diagnosed_full_fine_tuning_first(tmp_path: Path) -> None:
    rows = [
        row("hra", [0.9, 0.8], runs=["runs/hra-seed-1", "runs/hra-seed-2"]),
        row("lora", [0.8, 0.7], runs=["runs/gone", "runs/lora-seed-2"]),
        row("full", [0.8, 0.7], None, runs=["runs/full-seed-1"]),
        row("frozen", [0.5], None),
    ]
    folder = write_comparison(tmp_path / "c", summary(rows))
    for path in ("hra-seed-1/adapter", "hra-seed-2/adapter", "lora-seed-2/adapter", "full-seed-1/model"):
        (folder / "runs" / path).mkdir(parents=True)
    asked = []

    def diagnose(path: Path, base: str | Path | None) -> dict:
        asked.append((str(path.relative_to(folder / "runs")), base))
        return diagnosis(path.parent.name, layers=1)

    collected = collect([folder])
    add_diagnoses(collected, diagnose=diagnose, progress=False)
    assert asked == [("full-seed-1/model", None), ("hra-seed-1/adapter", None), ("lora-seed-2/adapter", None)]
    assert [one.label for one in collected.diagnoses] == ["full fine-tuning", "hra", "lora"]
    limited = collect([folder])
    add_diagnoses(limited, "elsewhere", most=1, diagnose=diagnose, progress=False)
    assert asked[-1] == ("full-seed-1/model", "elsewhere")
    assert limited.notes == ["2 models were not diagnosed, beyond the limit of 1 (--diagnose-most)."]


def test_what_cannot_be_diagnosed_is_noted_and_stops_nothing(tmp_path: Path) -> None:
    def refuse(*_: object) -> dict:
        raise CheckpointError("the base is not at hand")

    collected: Collected = collect([write_adapter(tmp_path / "adapter")])
    add_diagnoses(collected, diagnose=refuse, progress=False)
    assert collected.diagnoses == []
    assert collected.notes == ["adapter was not diagnosed: the base is not at hand."]
