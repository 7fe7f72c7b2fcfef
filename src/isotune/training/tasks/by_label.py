"""What a classifier does with each label: precision, recall and F1, and what it takes it for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

ByLabel = dict[str, dict[str, Any]]
"""By label `support` (how often it is the true one), `precision`, `recall`, `f1`; of rows also `predicted`, how often
each label was told where this one is true."""


def confusion(predicted: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> ByLabel:
    """Of rows with one label each, as numbers, both of shape (n,); labels of no row are among the result, too."""
    pairs, counts = np.unique(np.stack([labels, predicted], axis=1), axis=0, return_counts=True)
    told: dict[str, dict[str, int]] = {name: {} for name in names}
    for (true, guess), count in zip(pairs.tolist(), counts.tolist(), strict=True):
        told[names[true]][names[guess]] = count
    support, found = (np.bincount(numbers, minlength=len(names)).tolist() for numbers in (labels, predicted))
    return {
        name: {**scored(told[name].get(name, 0), found[place], support[place]), "predicted": told[name]}
        for place, name in enumerate(names)
    }


def scored(hits: int, found: int, true: int) -> dict[str, Any]:
    """The scores of a label that was told `found` times, `hits` of them right, and is true `true` times.

    As usual, precision and recall are 0 where there is nothing to divide by.
    """
    return {
        "support": true,
        "precision": hits / found if found else 0.0,
        "recall": hits / true if true else 0.0,
        "f1": 2 * hits / (found + true) if found + true else 0.0,
    }


def confused_with(label: str, scores: Mapping[str, Any], most: int = 3) -> str:
    """The labels that were told in place of this one, the commonest first: `plant 3, rock 1`."""
    others = sorted(
        ((name, count) for name, count in scores.get("predicted", {}).items() if name != label),
        key=lambda told: -told[1],
    )
    more = ", ..." if len(others) > most else ""
    return ", ".join(f"{name} {count}" for name, count in others[:most]) + more
