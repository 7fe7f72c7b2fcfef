"""The pretrained model as it is: what every adapter is measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import transformers

from isotune.training.arguments import resolve_training, training_arguments
from isotune.training.data import load_splits
from isotune.training.probe import Probe
from isotune.training.progress import Screen
from isotune.training.recipe import Recipe
from isotune.training.session import Session, TaskSpec
from isotune.training.start import session_probe, split_features
from isotune.training.tasks.collator import Example


@dataclass(frozen=True)
class Frozen:
    """A linear probe on a frozen model, and what it reaches."""

    probe: Probe
    metrics: dict[str, float]
    """Flat keys: `validation_accuracy`, `test_accuracy`, ... of the splits there are."""
    session: Session
    examples: dict[str, list[Example]]


def frozen_probe(recipe: Recipe, screen: Screen | None = None) -> Frozen:
    """Fit a linear probe to a classification's training rows, its strength chosen on the validation rows."""
    session, examples = _prepared(recipe)
    features = split_features(session, examples, screen or Screen(False))
    probe = session_probe(session, features)
    found = {name: probe.metrics(*features[name]) for name in features if name != "train"}
    metrics = {f"{split}_{name}": value for split, of in found.items() for name, value in of.items()}
    return Frozen(probe, metrics, session, examples)


def frozen_metrics(recipe: Recipe) -> dict[str, Any]:
    """What the model itself reaches on the validation and the test rows."""
    session, examples = _prepared(recipe)
    still = recipe.model_copy(update={"training": {**recipe.training, "eval_strategy": "no"}})
    trainer = session.trainer(training_arguments(resolve_training(still, 0.0), recipe.output))
    metrics: dict[str, Any] = {}
    for name in ("validation", "test"):
        if name in examples:
            metrics |= session.task.of_trainer(trainer.evaluate(examples[name], metric_key_prefix=name), name)
    return metrics


def _prepared(recipe: Recipe) -> tuple[Session, dict[str, list[Example]]]:
    splits = load_splits(recipe.data, recipe.task, recipe.seed)
    transformers.set_seed(recipe.seed)
    session = Session(TaskSpec.of(recipe, splits.labels, splits.positive))
    rows = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    return session, {name: session.examples(part) for name, part in rows.items() if part}
