"""Classification of texts: one label a row, the model's own head or one of ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers

from isotune.errors import DataError
from isotune.training.classifiers import head_paths, load_classifier, pooling_of
from isotune.training.tasks.contract import Example, Task

if TYPE_CHECKING:
    from isotune.training.data import Row
    from isotune.training.recipe import DataSettings
    from isotune.training.session import TaskSpec


class Classification(Task):
    """Rows of `text` and `label`."""

    metrics = ("accuracy", "macro_f1", "loss")
    metric = "accuracy"
    higher_is_better = True
    probed = True
    expectation = "exact"

    def columns(self, data: DataSettings) -> dict[str, list[str]]:
        """Text and label."""
        return {"text": [data.text] if isinstance(data.text, str) else data.text, "label": [data.label]}

    def labels(self, rows: Sequence[Row], data: DataSettings) -> list[str]:
        """The labels that the rows have, numbers by their size. Raises DataError for a single one."""
        labels = sorted({row["label"] for row in rows}, key=_number_or_word)
        if len(labels) < 2:
            raise DataError(
                f"{data.train}: every training row has the label {labels[0]!r}; "
                f"a classification needs at least two (column {data.label!r})"
            )
        return labels

    def load(self, spec: TaskSpec) -> tuple[Any, list[str], TaskSpec]:
        """A classifier, and its pooling."""
        model = load_classifier(spec.model, spec.labels, spec.pooling, spec.dtype, spec.backbone)
        return model, head_paths(model), replace(spec, pooling=pooling_of(model))

    def examples(self, rows: Sequence[Row], tokenizer: Any, spec: TaskSpec) -> list[Example]:
        """Texts cut at `spec.max_length` tokens; labels as numbers, where the rows have labels."""
        if not rows:
            return []
        numbers = {name: number for number, name in enumerate(spec.labels)}
        texts = [row["text"] for row in rows]
        tokens = tokenizer(texts, truncation=True, max_length=spec.max_length)["input_ids"]
        return [
            {"input_ids": ids, "labels": numbers[row["label"]]} if "label" in row else {"input_ids": ids}
            for ids, row in zip(tokens, rows, strict=True)
        ]

    def measured(self, prediction: transformers.EvalPrediction) -> dict[str, float]:
        """Of logits of shape (rows, classes)."""
        return classification_metrics(np.asarray(prediction.predictions), np.asarray(prediction.label_ids))

    def predicted(self, rows: Sequence[Row], scores: np.ndarray, spec: TaskSpec) -> list[dict[str, Any]]:
        """Each row with its most probable label and that label's probability."""
        probabilities = torch.from_numpy(scores).double().softmax(-1).numpy()
        return [
            {**row, "prediction": spec.labels[p.argmax()], "probability": float(p.max())}
            for row, p in zip(rows, probabilities, strict=True)
        ]


def classification_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Accuracy, macro-F1 (over the classes that occur in labels or predictions) and mean cross entropy."""
    predicted = logits.argmax(-1)
    scores = []
    for label in np.union1d(labels, predicted):
        hits = int(((predicted == label) & (labels == label)).sum())
        scores.append(2 * hits / int((predicted == label).sum() + (labels == label).sum()))
    loss = torch.nn.functional.cross_entropy(torch.from_numpy(logits).double(), torch.from_numpy(labels))
    return {
        "accuracy": float((predicted == labels).mean()),
        "macro_f1": float(np.mean(scores)),
        "loss": loss.item(),
    }


def _number_or_word(label: str) -> tuple[int, int, str]:
    return (0, int(label), label) if label.lstrip("-").isdecimal() else (1, 0, label)
