"""Where a run starts from: a head from a linear probe, and methods that start from data."""

from __future__ import annotations

import torch
from torch import Tensor

import isotune
from isotune.training.classifiers import logits_layer
from isotune.training.probe import Probe, extract_features, fit_probe
from isotune.training.progress import Screen
from isotune.training.recipe import Recipe
from isotune.training.session import Session
from isotune.training.tasks.collator import Example
from isotune.training.tasks.names import TASKS

CALIBRATION_ROWS = 512
"""Training rows that a method which starts from data gets to see; its authors take 256 of 2048 tokens."""


def starts_from_probe(recipe: Recipe) -> bool:
    """Whether the head starts from a linear probe."""
    return TASKS[recipe.task].probed and recipe.head == "probe"


def probe_of(session: Session, examples: dict[str, list[Example]], screen: Screen) -> Probe:
    """A linear probe on the features of the model without its adapters."""
    names = [name for name in ("train", "validation") if examples[name]]
    with isotune.disabled(session.model):
        features = split_features(session, {name: examples[name] for name in names}, screen)
    return session_probe(session, features)


def session_probe(session: Session, features: dict[str, tuple[Tensor, Tensor]]) -> Probe:
    """A probe that the head of the session's model can hold, from features of `split_features`."""
    bias = logits_layer(session.model).bias is not None
    spec = session.spec
    return fit_probe(
        *features["train"], len(spec.labels), features.get("validation"), bias=bias, positive=spec.positive_number
    )


def split_features(
    session: Session, examples: dict[str, list[Example]], screen: Screen
) -> dict[str, tuple[Tensor, Tensor]]:
    """The features (n, hidden) and labels (n,) of each split, with a progress bar."""
    with screen.counting("features", sum(map(len, examples.values()))) as advance:
        return {
            name: extract_features(session.model, part, session.collator, advance=advance)
            for name, part in examples.items()
        }


def start_from(session: Session, probe: Probe, screen: Screen) -> None:
    """Let the head start from a probe."""
    with torch.no_grad():
        head = logits_layer(session.model)
        head.weight.copy_(probe.weight)
        if head.bias is not None:
            head.bias.copy_(probe.bias)
    metric = session.spec.judged_by
    shown = f": validation {metric} {probe.validation[metric]:.4f}" if probe.validation else ""
    screen.say(f"the head starts from a linear probe{shown}")


def calibrate_on(session: Session, rows: list[Example], recipe: Recipe, screen: Screen) -> None:
    """Let a method that starts from data see training rows, drawn by the recipe's seed."""
    size = recipe.training["per_device_train_batch_size"]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(recipe.seed)).tolist()
    chosen = [rows[index] for index in order[:CALIBRATION_ROWS]]
    batches = [session.collator(chosen[start : start + size]) for start in range(0, len(chosen), size)]
    isotune.calibrate(session.model, batches, least_rows=1, progress=screen.enabled)
    screen.say(f"{recipe.method['name']} starts from {len(chosen)} training rows")
