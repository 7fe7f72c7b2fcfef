"""From a recipe to a trained adapter: data, model, `transformers.Trainer`, evaluation.

    from isotune.training import Recipe, evaluate, train

The names are loaded on first use.
"""

from __future__ import annotations

from isotune.lazy import lazy

_HOMES = {
    "Recipe": "recipe",
    "build_recipe": "recipe",
    "Result": "run",
    "Interrupted": "run",
    "train": "run",
    "evaluate": "evaluation",
    "predict": "prediction",
    "fit_probe": "probe",
    "Federated": "federated",
    "dirichlet_split": "federated",
    "federated_rounds": "federated",
    "collect_fisher": "statistics",
}

__all__ = [
    "Federated",
    "Interrupted",
    "Recipe",
    "Result",
    "build_recipe",
    "collect_fisher",
    "dirichlet_split",
    "evaluate",
    "federated_rounds",
    "fit_probe",
    "predict",
    "train",
]

__getattr__ = lazy(__name__, _HOMES)
