"""`isotune demo`, with few rows: all its steps on the real model and the real data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from isotune.cli import demo as cli_demo
from isotune.comparison import run
from isotune.comparison.plan import make_plan
from isotune.comparison.results import Row, Summary
from isotune.training import demo


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "QUICK", {"data.max_train_rows": 48, "data.max_eval_rows": 24})


@pytest.mark.usefixtures("few_rows")
def test_the_demo_runs_from_the_probe_to_the_served_adapter(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("demo", "--quick", "--output", tmp_path / "demo", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    probe, hra, lora = found["rows"]
    assert probe["trainable_parameters_encoder"] == 0
    assert hra["trainable_parameters_encoder"] == lora["trainable_parameters_encoder"] == 36864
    served = found["served"]
    assert served["asked"] == 24
    assert len(served["agree"]) == 4
    assert set(served["agree"].values()) == {24}
    assert served["residual"] < 1e-5
    # A second time, into the same folder.
    assert command("demo", "--quick", "--output", tmp_path / "demo") == 0
    assert "isotune train --model minilm" in capsys.readouterr().out


def test_seeds_compare_hra_and_lora_of_one_size_with_the_same_search(tmp_path: Path) -> None:
    recipe = cli_demo.comparison(tmp_path, quick=True, seeds=2)
    hra, lora, frozen = make_plan(recipe)
    assert (hra.options, lora.options) == ({"rank": 8}, {"rank": 4})
    assert hra.parameters == lora.parameters == 36_864
    assert (frozen.label, recipe.compare.seeds, recipe.compare.trials) == ("frozen", 2, 5)
    assert recipe.data.max_train_rows == demo.QUICK["data.max_train_rows"]
    assert cli_demo.comparison(tmp_path, quick=False, seeds=3).data.max_train_rows is None


def test_a_comparison_is_shown_as_isotune_compare_shows_it(
    command: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = {"hra": [0.8, 0.9], "lora": [0.80, 0.81]}
    rows = [Row(method=name, parameters=36_864, seeds=[1, 2], values=own) for name, own in values.items()]
    found = Summary(metric="accuracy", baseline="lora", rows=rows)
    monkeypatch.setattr(run, "compare", lambda recipe: found if recipe.output == str(tmp_path) else None)
    assert command("demo", "--seeds", 2, "--output", tmp_path, "--json") == 0
    assert json.loads(capsys.readouterr().out) == found.model_dump()
    assert command("demo", "--seeds", 2, "--output", tmp_path) == 0
    shown = capsys.readouterr().out
    assert "85.0 [21.5, 100.0]" in shown
    assert "80.5 ± 6.4" in shown


def test_a_foreign_folder_is_left_alone(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "demo" / "hra").mkdir(parents=True)
    (tmp_path / "demo" / "hra" / "thesis.txt").write_text("mine")
    assert command("demo", "--quick", "--output", tmp_path / "demo") == 2
    assert "choose another folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "demo").rglob("*")] == ["hra", "thesis.txt"]
