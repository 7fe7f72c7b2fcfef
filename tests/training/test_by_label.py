"""What is measured of each label: against scikit-learn, and where a run leaves it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics as reference
from tiny import write_recipe

from isotune.training.evaluation import evaluate
from isotune.training.recipe import build_recipe
from isotune.training.run import train
from isotune.training.tasks.by_label import confused_with, confusion
from isotune.training.tasks.token_classification import entity_counts, token_metrics

NAMES = ["ant", "bee", "cow", "dog", "elk"]


def drawn() -> tuple[np.ndarray, np.ndarray]:
    """Of five labels the last is never true, and the first is never told."""
    draw = np.random.default_rng(0)
    return draw.integers(1, 5, size=80), draw.integers(4, size=80)


def test_the_scores_of_each_label_are_scikit_learns() -> None:
    predicted, labels = drawn()
    found = confusion(predicted, labels, NAMES)
    wanted = reference.precision_recall_fscore_support(labels, predicted, labels=range(5), zero_division=0)
    for place, name in enumerate(NAMES):
        own = [found[name][key] for key in ("precision", "recall", "f1", "support")]
        assert own == pytest.approx([scores[place] for scores in wanted]), name


def test_the_confusions_are_scikit_learns() -> None:
    predicted, labels = drawn()
    matrix = reference.confusion_matrix(labels, predicted, labels=range(5))
    found = confusion(predicted, labels, NAMES)
    assert [[found[true]["predicted"].get(told, 0) for told in NAMES] for true in NAMES] == matrix.tolist()
    assert found["elk"]["predicted"] == {}
    assert json.loads(json.dumps(found)) == found


def test_confusions_are_told_the_commonest_first() -> None:
    scores = {"predicted": {"ant": 9, "bee": 1, "cow": 4, "dog": 2, "elk": 3}}
    assert confused_with("ant", scores) == "cow 4, elk 3, dog 2, ..."
    assert confused_with("ant", {"predicted": {"ant": 9}}) == ""


def test_entities_are_counted_by_their_kind() -> None:
    labels = ["O", "B-PER", "I-PER", "B-LOC"]
    true, told = [1, 2, 0, 3, 0], [1, 0, 0, 3, 3]
    kept = np.array([[[a, 0.5, b] for a, b in zip(told, true, strict=True)]])
    hits, found, wanted = entity_counts(kept, labels)
    assert (dict(hits), dict(found), dict(wanted)) == ({"LOC": 1}, {"PER": 1, "LOC": 2}, {"PER": 1, "LOC": 1})
    assert token_metrics(kept, labels)["precision"] == hits.total() / found.total()


@pytest.fixture(scope="module")
def finished(bert: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("by-label")
    recipe = write_recipe(folder / "recipe.yaml", bert, rows, folder / "run", max_steps=12)
    return train(build_recipe(recipe), progress=False).output


def test_a_run_leaves_each_label_of_its_test_rows_and_evaluating_finds_the_same(finished: Path) -> None:
    left = json.loads((finished / "metrics.json").read_text())
    labels = left["test_labels"]
    assert "validation_labels" not in left
    assert sum(scores["support"] for scores in labels.values()) == left["test_rows"] == 15
    right = sum(scores["predicted"].get(name, 0) for name, scores in labels.items())
    assert right / 15 == left["test_accuracy"]
    assert left["test_macro_f1"] == pytest.approx(np.mean([scores["f1"] for scores in labels.values()]))
    assert evaluate(finished, progress=False)["labels"] == labels


def test_without_test_rows_a_run_leaves_each_label_of_its_validation_rows(
    bert: Path, rows: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", bert, rows, tmp_path / "run", max_steps=4)
    built = build_recipe(recipe, {}, ["data.test=null", "data.validation=0.25"])
    left = train(built, progress=False).metrics
    right = sum(scores["predicted"].get(name, 0) for name, scores in left["validation_labels"].items())
    assert right / 12 == left["validation_accuracy"]
