"""The scripts of examples/compare-rates add runs to a file, and none twice."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from examples import ROOT, load_script

SCRIPTS = ROOT / "examples" / "compare-rates"


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """That on Shakespeare with two methods, a few rows and short ones."""
    made: dict[str, Any] = yaml.safe_load((SCRIPTS / "shakespeare.yaml").read_text())
    made["data"] |= {"max_length": 16, "max_train_rows": 8, "max_eval_rows": 4}
    made["compare"] |= {"methods": ["lora", "hra"]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(made))
    return tmp_path / "recipe.yaml"


def lines_after(
    name: str, recipe: Path, output: Path, monkeypatch: pytest.MonkeyPatch, *more: str
) -> list[dict[str, Any]]:
    """What is in the file after the script was called."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [name, str(recipe), str(output), *more])
    load_script(SCRIPTS / f"{name}.py", monkeypatch).main()
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_more_rates_are_tried_for_the_methods_that_are_named(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe, tmp_path / "results.jsonl", monkeypatch
    found = lines_after("more_rates", *asked, "--multiples", "1", "--methods", "lora")
    assert [(line["method"], line["kind"], line["learning_rate"]) for line in found] == [
        ("frozen", "seed", None),
        ("lora", "trial", 0.01),
    ]
    found = lines_after("more_rates", *asked, "--multiples", "1", "2", "--methods", "lora")
    assert [line["learning_rate"] for line in found] == [None, 0.01, 0.02]
    assert all(line["metrics"]["validation_loss"] > 0 for line in found)


def test_auto_is_run_once_for_each_method(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "auto.jsonl"
    output.write_text(json.dumps({"method": "hra"}) + "\n")
    _, found = lines_after("auto", recipe, output, monkeypatch)
    assert found["method"] == "lora"
    assert found["learning_rate"] > 0
    assert lines_after("auto", recipe, output, monkeypatch) == [{"method": "hra"}, found]
