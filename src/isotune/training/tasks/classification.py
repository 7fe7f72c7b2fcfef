"""Classification of texts and of pairs: one label a row, the model's own head or one of ours."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers

from isotune.errors import DataError
from isotune.training.tasks.by_label import ByLabel, confusion
from isotune.training.tasks.sequences import OnTexts

if TYPE_CHECKING:
    from isotune.training.data import Row
    from isotune.training.recipe import DataSettings
    from isotune.training.session import TaskSpec


class Classification(OnTexts):
    """One of several labels for a text, or a pair."""

    metrics = ("accuracy", "f1", "macro_f1", "matthews", "loss")
    metric = "accuracy"
    counted = ("accuracy",)
    probable = True
    expectation = "exact"

    def labels(self, rows: Sequence[Row], data: DataSettings) -> list[str]:
        """The labels that the rows have, numbers by their size. Raises DataError for a single one, or a measure."""
        labels = sorted({row["label"] for row in rows}, key=_number_or_word)
        if len(labels) < 2:
            named = f" (column {data.label!r})" if data.label else ""
            raise DataError(
                f"{data.train}: every training row has the label {labels[0]!r}; "
                f"a classification needs at least two{named}"
            )
        if len(labels) > 10 and all(map(_is_measure, labels)):
            raise DataError(
                f"{data.train}: the {len(labels)} labels are numbers such as {labels[0]} and {labels[-1]}, which "
                "measure something and are no classes; learn them with task: regression (--task regression)"
            )
        return labels

    def positive(self, rows: Sequence[Row], labels: Sequence[str], data: DataSettings) -> str | None:
        """The one that the recipe names, else the rarer of two (the second of two as common), and of more none."""
        if data.positive is None:
            counts = Counter(row["label"] for row in rows)
            return min(reversed(labels), key=counts.__getitem__) if len(labels) == 2 else None
        if len(labels) != 2 or data.positive not in labels:
            raise DataError(
                f"data.positive is {data.positive!r}, which has to be one of two labels; the training rows have: "
                f"{', '.join(labels)}"
            )
        return data.positive

    def check(self, rows: Sequence[Row], labels: Sequence[str], where: str) -> None:
        """Raise DataError for the first row whose label is not among `labels`; rows without labels pass."""
        known = set(labels)
        for number, row in enumerate(rows, start=1):
            if "label" in row and row["label"] not in known:
                raise DataError(
                    f"row {number} of {where} has the label {row['label']!r}, which the training rows do not have; "
                    f"they have: {', '.join(labels)}"
                )

    def number(self, label: str, spec: TaskSpec) -> int:
        """The label's place among the task's."""
        return spec.labels.index(label)

    def measured(self, prediction: transformers.EvalPrediction, spec: TaskSpec) -> dict[str, float]:
        """Of logits of shape (rows, classes)."""
        logits, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
        return classification_metrics(logits, labels, spec.positive_number)

    def by_label(self, prediction: transformers.EvalPrediction, spec: TaskSpec) -> ByLabel:
        """Of logits of shape (rows, classes)."""
        predicted = np.asarray(prediction.predictions).argmax(-1)
        return confusion(predicted, np.asarray(prediction.label_ids), spec.labels)

    def constant(self, train: Sequence[Row], rows: Sequence[Row]) -> dict[str, float]:
        """Of the commonest training label."""
        (commonest, _), *_ = Counter(row["label"] for row in train).most_common(1)
        return {"majority_accuracy": sum(row["label"] == commonest for row in rows) / len(rows)}

    def predicted(self, rows: Sequence[Row], scores: np.ndarray, spec: TaskSpec) -> list[dict[str, Any]]:
        """Each row with its most probable label and that label's probability."""
        return [
            {**row, "prediction": spec.labels[p.argmax()], "probability": float(p.max())}
            for row, p in zip(rows, _softmax(scores), strict=True)
        ]

    def probabilities(self, scores: np.ndarray, spec: TaskSpec) -> list[dict[str, float]]:
        """Of logits of shape (rows, classes)."""
        return [dict(zip(spec.labels, p, strict=True)) for p in _softmax(scores).tolist()]


def _softmax(scores: np.ndarray) -> np.ndarray:
    """In float64, shape (rows, classes)."""
    return torch.from_numpy(scores).double().softmax(-1).numpy()


def classification_metrics(logits: np.ndarray, labels: np.ndarray, positive: int = 1) -> dict[str, float]:
    """Accuracy, F1, macro-F1 (over the classes in labels or predictions), Matthews' correlation, mean cross entropy.

    F1 is that of the class `positive` of two (0 where it is neither told nor true), and of more the macro-F1.
    """
    predicted = logits.argmax(-1)
    scores = {}
    for label in np.union1d(labels, predicted):
        hits = int(((predicted == label) & (labels == label)).sum())
        scores[int(label)] = 2 * hits / int((predicted == label).sum() + (labels == label).sum())
    loss = torch.nn.functional.cross_entropy(torch.from_numpy(logits).double(), torch.from_numpy(labels))
    macro = float(np.mean(list(scores.values())))
    return {
        "accuracy": float((predicted == labels).mean()),
        "f1": scores.get(positive, 0.0) if logits.shape[-1] == 2 else macro,
        "macro_f1": macro,
        "matthews": matthews(predicted, labels, logits.shape[-1]),
        "loss": loss.item(),
    }


def matthews(predicted: np.ndarray, labels: np.ndarray, classes: int) -> float:
    """The correlation of predictions and labels as one-hot vectors; 0 where one of them is constant.

    Gorodkin, "Comparing two K-category assignments by a K-category correlation coefficient", 2004.
    """
    found, true = np.eye(classes)[predicted], np.eye(classes)[labels]
    found, true = found - found.mean(0), true - true.mean(0)
    spread = math.sqrt(float((found**2).sum()) * float((true**2).sum()))
    return float((found * true).sum()) / spread if spread else 0.0


def _number_or_word(label: str) -> tuple[int, int, str]:
    return (0, int(label), label) if label.lstrip("-").isdecimal() else (1, 0, label)


def _is_measure(label: str) -> bool:
    """Whether it is a number with a fraction, or written like one."""
    try:
        return "." in label and math.isfinite(float(label))
    except ValueError:
        return False
