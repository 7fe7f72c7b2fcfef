"""Regression: a number for a text or a pair, such as how alike two sentences are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import transformers

from isotune.errors import DataError
from isotune.training.tasks.contract import as_number
from isotune.training.tasks.sequences import OnTexts

if TYPE_CHECKING:
    from isotune.training.data import Row
    from isotune.training.recipe import DataSettings
    from isotune.training.session import TaskSpec


class Regression(OnTexts):
    """A number for a text, or a pair, by least squares."""

    named = False
    metrics = ("pearson", "spearman", "pearson_spearman", "rmse", "loss")
    metric = "pearson"
    expectation = "empirical"

    def cell(self, key: str, value: Any) -> Any:
        """Labels are numbers."""
        return as_number(value) if key == "label" else super().cell(key, value)

    def labels(self, rows: Sequence[Row], data: DataSettings) -> list[str]:
        """None. Raises DataError where all rows have the same number."""
        if len({row["label"] for row in rows}) < 2:
            raise DataError(f"{data.train}: every training row has the number {rows[0]['label']:g}; nothing to learn")
        return []

    def measured(self, prediction: transformers.EvalPrediction, spec: TaskSpec) -> dict[str, float]:
        """Of outputs of shape (rows, 1)."""
        return regression_metrics(np.asarray(prediction.predictions), np.asarray(prediction.label_ids))

    def constant(self, train: Sequence[Row], rows: Sequence[Row]) -> dict[str, float]:
        """Of the training rows' mean."""
        mean = float(np.mean([row["label"] for row in train]))
        return {"mean_rmse": float(np.sqrt(np.mean([(row["label"] - mean) ** 2 for row in rows])))}

    def predicted(self, rows: Sequence[Row], scores: np.ndarray, spec: TaskSpec) -> list[dict[str, Any]]:
        """Each row with its number."""
        return [{**row, "prediction": float(score)} for row, score in zip(rows, scores.reshape(-1), strict=True)]


def regression_metrics(outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Pearson's and Spearman's correlation, their mean, the mean squared error as the loss, and its root."""
    found, true = outputs.reshape(-1).astype(np.float64), labels.reshape(-1).astype(np.float64)
    error = float(np.square(found - true).mean())
    linear, ranked = pearson(found, true), pearson(_ranks(found), _ranks(true))
    return {
        "pearson": linear,
        "spearman": ranked,
        "pearson_spearman": (linear + ranked) / 2,
        "rmse": error**0.5,
        "loss": error,
    }


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """The correlation of two vectors; 0 where one of them is constant."""
    x, y = x - x.mean(), y - y.mean()
    spread = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / spread if spread else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values sharing the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts - 1) / 2)[place.reshape(-1)]
