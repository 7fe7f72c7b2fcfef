"""From a recipe to a trained adapter: data, model, `transformers.Trainer`, evaluation.

    from isotune.training import Recipe, evaluate, train

The names are loaded on first use, so that importing this package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Recipe": "recipe",
    "build_recipe": "recipe",
    "Result": "run",
    "Interrupted": "run",
    "train": "run",
    "evaluate": "evaluation",
    "fit_probe": "probe",
    "Federated": "federated",
    "dirichlet_split": "federated",
    "federated_rounds": "federated",
}

__all__ = [
    "Federated",
    "Interrupted",
    "Recipe",
    "Result",
    "build_recipe",
    "dirichlet_split",
    "evaluate",
    "federated_rounds",
    "fit_probe",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"isotune.training.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
