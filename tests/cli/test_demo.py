"""`isotune demo`, with few rows: all its steps on the real model and the real data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from isotune.cli import demo as cli_demo
from isotune.training import demo


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "QUICK", {"data.max_train_rows": 96, "data.max_eval_rows": 48})


@pytest.mark.usefixtures("few_rows")
def test_the_demo_runs_from_the_probe_to_the_served_adapter(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("demo", "--quick", "--output", tmp_path / "demo", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    probe, hra, lora = found["rows"]
    assert probe["trainable_parameters_encoder"] == 0
    assert hra["trainable_parameters_encoder"] == lora["trainable_parameters_encoder"] == 36864
    assert found["test_rows"] == 48
    assert len(found["agree"]) == 4
    assert set(found["agree"].values()) == {48}
    assert found["export_residual"] < 1e-5
    # A second time, into the same folder.
    assert command("demo", "--quick", "--output", tmp_path / "demo") == 0
    assert "isotune train --model minilm" in capsys.readouterr().out


@pytest.mark.usefixtures("few_rows")
def test_a_comparison_searches_both_methods_alike_and_reuses_finished_runs(
    command: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cli_demo, "TRIALS", 2)
    assert command("demo", "--quick", "--seeds", 2, "--output", tmp_path / "compare", "--json") == 0
    first = json.loads(capsys.readouterr().out)
    rows = {row["method"]: row for row in first["rows"]}
    assert {name: (len(row["learning_rates"]), len(row["values"])) for name, row in rows.items()} == {
        "hra": (2, 2),
        "lora": (2, 2),
        "frozen": (0, 2),
    }
    assert rows["hra"]["parameters"] == rows["lora"]["parameters"] == 36_864
    monkeypatch.setattr(demo.Session, "trainer", None)  # no run is trained again
    assert command("demo", "--quick", "--seeds", 2, "--output", tmp_path / "compare", "--json") == 0
    assert json.loads(capsys.readouterr().out) == first


def test_a_foreign_folder_is_left_alone(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "demo" / "hra").mkdir(parents=True)
    (tmp_path / "demo" / "hra" / "thesis.txt").write_text("mine")
    assert command("demo", "--quick", "--output", tmp_path / "demo") == 2
    assert "choose another folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "demo").rglob("*")] == ["hra", "thesis.txt"]
