"""The paper's experiments are recipes that the commands take."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from examples import ROOT
from isotune.comparison.recipe import build_comparison
from isotune.training.recipe import build_recipe

GLUE = sorted((ROOT / "examples" / "paper" / "glue").glob("*.yaml"))


@pytest.mark.parametrize("file", GLUE, ids=lambda file: file.stem)
def test_a_recipe_of_glue_is_one(file: Path) -> None:
    recipe = build_recipe(file)
    assert recipe.task == ("regression" if file.stem == "stsb" else "classification")
    assert recipe.data.subset == file.stem
    assert isinstance(recipe.data.text, list) == (file.stem not in ("sst2", "cola"))


def test_all_eight_tasks_are_there_at_the_papers_rates() -> None:
    rates = {
        "cola": 9e-3, "mnli": 1e-2, "mrpc": 6e-3, "qnli": 1e-2, "qqp": 8e-3, "rte": 5e-3, "sst2": 3e-3, "stsb": 5e-3,
    }  # fmt: skip
    assert [file.stem for file in GLUE] == list(rates)
    theirs, ours = math.sqrt(2 * 768 / (3 * 8)), math.sqrt(768 / 384) * math.sqrt(72 / 12)
    for file in GLUE:
        found = build_recipe(file).training["learning_rate"]
        assert found == pytest.approx(rates[file.stem] * ours / theirs, rel=0.02)


def test_the_comparison_on_mathematics_is_one() -> None:
    recipe = build_comparison(ROOT / "examples" / "paper" / "gsm8k" / "recipe.yaml")
    assert [method["name"] for method in recipe.methods] == ["hra", "hra", "hra", "hra", "lora", "dora", "oft"]
