"""Which metric a run is judged by: what is measured, and that a recipe's choice is followed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn import metrics as reference
from tiny import ANIMALS, PLANTS, write_jsonl

from isotune.errors import DataError, IsotuneError
from isotune.training.arguments import resolve_training
from isotune.training.data import load_splits
from isotune.training.recipe import DataSettings, Recipe, build_recipe
from isotune.training.run import train
from isotune.training.session import TaskSpec
from isotune.training.tasks.classification import classification_metrics
from isotune.training.tasks.contract import higher_is_better, signed
from isotune.training.tasks.names import metric_of
from isotune.training.tasks.regression import regression_metrics


@pytest.mark.parametrize("positive", [0, 1])
def test_f1_of_two_labels_is_that_of_the_positive_one(positive: int) -> None:
    draw = np.random.default_rng(0)
    logits, labels = draw.normal(size=(60, 2)), draw.integers(2, size=60)
    wanted = reference.f1_score(labels, logits.argmax(-1), pos_label=positive)
    assert classification_metrics(logits, labels, positive)["f1"] == pytest.approx(wanted)


def test_f1_of_more_labels_is_the_macro_f1() -> None:
    draw = np.random.default_rng(0)
    found = classification_metrics(draw.normal(size=(60, 4)), draw.integers(4, size=60))
    assert found["f1"] == found["macro_f1"]


def test_f1_of_a_label_that_is_neither_told_nor_true_is_zero() -> None:
    assert classification_metrics(np.array([[1.0, 0.0]] * 3), np.zeros(3, dtype=int), 1)["f1"] == 0


def test_pearson_spearman_is_their_mean() -> None:
    draw = np.random.default_rng(1)
    found = regression_metrics(draw.normal(size=(30, 1)), draw.normal(size=30))
    assert found["pearson"] != found["spearman"]
    assert found["pearson_spearman"] == pytest.approx((found["pearson"] + found["spearman"]) / 2)


def test_an_unknown_metric_is_answered_with_those_there_are() -> None:
    wanted = "regression has no metric 'pearsons'. Did you mean 'pearson'? Its metrics are: pearson, spearman, pears"
    with pytest.raises(IsotuneError) as raised:
        metric_of("regression", "pearsons")
    assert str(raised.value).startswith(wanted)
    recipe = Recipe(model="x", data=DataSettings(train="x"), output="x", metric="rmse")
    with pytest.raises(IsotuneError, match="classification has no metric 'rmse'"):
        resolve_training(recipe, 1e-3)


@pytest.mark.parametrize(("metric", "higher"), [("matthews", True), ("loss", False), ("exact_match", True)])
def test_less_is_better_of_losses_alone(metric: str, higher: bool) -> None:
    assert higher_is_better(metric) is higher
    assert signed(metric, 0.25) == (0.25 if higher else -0.25)


def uneven(folder: Path, animals: int, plants: int) -> Path:
    rows = [{"text": f"the {ANIMALS[n % 6]} near {n}", "label": "animal"} for n in range(animals)]
    rows += [{"text": f"a green {PLANTS[n % 6]} {n}", "label": "plant"} for n in range(plants)]
    return write_jsonl(folder / f"{animals}-{plants}.jsonl", rows)


@pytest.mark.parametrize(
    ("animals", "plants", "named", "wanted"),
    [(4, 8, None, "animal"), (8, 4, None, "plant"), (6, 6, None, "plant"), (4, 8, "plant", "plant")],
)
def test_the_positive_label_is_the_rarer_one_unless_named(
    animals: int, plants: int, named: str | None, wanted: str, tmp_path: Path
) -> None:
    data = DataSettings(train=str(uneven(tmp_path, animals, plants)), positive=named)
    assert load_splits(data, "classification", 0).positive == wanted


@pytest.mark.parametrize(("task", "said"), [("classification", "one of two labels"), ("regression", "does not tell")])
def test_a_positive_label_that_cannot_be_is_refused(task: str, said: str, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", [{"text": "a", "label": str(n % 2)} for n in range(12)])
    with pytest.raises(DataError, match=said):
        load_splits(DataSettings(train=str(file), positive=7), task, 0)  # type: ignore[arg-type]


def recipe_of(model: Path, data: Path, output: Path, **more: Any) -> Recipe:
    flags = {
        "model": str(model), "data.train": str(data), "data.test": str(data), "output": str(output),
        "data.validation": 0.3, "training.num_train_epochs": 2, "training.learning_rate": 0.01, "method.rank": 2,
        "data.max_length": 16, "metric": "f1", **more,
    }  # fmt: skip
    return build_recipe(None, flags)


def test_a_run_keeps_what_it_is_judged_by(bert: Path, tmp_path: Path) -> None:
    result = train(recipe_of(bert, uneven(tmp_path, 10, 20), tmp_path / "run"), progress=False)
    left = json.loads((result.output / "metrics.json").read_text())
    assert 0 <= left["test_f1"] <= 1
    assert 0 <= left["test_probe_f1"] <= 1
    spec = TaskSpec.read(result.adapter)
    assert (spec.judged_by, spec.positive, spec.positive_number) == ("f1", "animal", 0)


def test_the_best_checkpoint_is_the_best_by_the_metric(bert: Path, tmp_path: Path) -> None:
    best = {
        "training.load_best_model_at_end": True, "training.save_strategy": "epoch", "training.eval_strategy": "epoch",
        "training.num_train_epochs": 3, "metric": "matthews",
    }  # fmt: skip
    recipe = recipe_of(bert, uneven(tmp_path, 12, 24), tmp_path / "run", **best)
    result = train(recipe, progress=False)
    history = json.loads((result.output / "history.json").read_text())
    assert result.metrics["validation_matthews"] == max(e["eval_matthews"] for e in history if "eval_loss" in e)
    plain = resolve_training(recipe.model_copy(update={"metric": None}), 1e-3).training
    chosen = resolve_training(recipe, 1e-3).training
    assert "metric_for_best_model" not in plain
    assert (chosen["metric_for_best_model"], chosen["greater_is_better"]) == ("matthews", True)
