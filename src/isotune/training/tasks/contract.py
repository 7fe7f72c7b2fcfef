"""What every task says of itself; `train`, `evaluate`, `compare` and the rest ask here, and nowhere else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import transformers

from isotune.statistics.likelihood import Expectation

if TYPE_CHECKING:
    from isotune.training.data import Row
    from isotune.training.recipe import DataSettings
    from isotune.training.session import TaskSpec

Example = dict[str, Any]
"""`input_ids` (a list) and `labels` (a number, or a list as long as `input_ids`)."""


class Task(ABC):
    """A task: the columns it reads, the model it loads, and what is measured of it."""

    metrics: ClassVar[tuple[str, ...]]
    """What is measured, the name of the mean loss among it."""
    metric: ClassVar[str]
    """What methods are compared by."""
    higher_is_better: ClassVar[bool]
    """Of `metric`."""
    probed: ClassVar[bool] = False
    """Whether a linear probe on the frozen model's features is a baseline, and a start for its head."""
    expectation: ClassVar[Expectation] = "sample"
    """Over which labels a Fisher information is taken, unless one says else."""

    @abstractmethod
    def columns(self, data: DataSettings) -> dict[str, list[str]]:
        """By key of a `Row` the columns it is made of."""

    def labels(self, rows: Sequence[Row], data: DataSettings) -> list[str]:
        """The label names in the order of their numbers. Raises DataError where the rows do not make a task."""
        return []

    def is_one_document(self, rows: Sequence[Row]) -> bool:
        """Whether the rows are one text, whose end is held out in place of some of the rows."""
        return False

    @abstractmethod
    def load(self, spec: TaskSpec) -> tuple[Any, list[str], TaskSpec]:
        """The pretrained model, the names of its head's modules, and the spec with what "auto" came to."""

    @abstractmethod
    def examples(self, rows: Sequence[Row], tokenizer: Any, spec: TaskSpec) -> list[Example]:
        """The rows as tokens, at most `spec.max_length` of them."""

    reduced: ClassVar[Callable[..., Any] | None] = None
    """What the trainer keeps of each batch's logits, as a function of logits and labels; None: the logits."""

    @abstractmethod
    def measured(self, prediction: transformers.EvalPrediction) -> dict[str, float]:
        """`metrics` of what the trainer kept."""

    @abstractmethod
    def predicted(self, rows: Sequence[Row], scores: np.ndarray, spec: TaskSpec) -> list[dict[str, Any]]:
        """Each row with what the model says of it; `scores` is what the trainer kept, one entry a row."""

    def of_trainer(self, found: Mapping[str, float], prefix: str) -> dict[str, float]:
        """Of a trainer's metrics those of the task, without its timings."""
        names = [f"{prefix}_{name}" for name in self.metrics]
        return {name: found[name] for name in names if name in found}

    def signed(self, value: float) -> float:
        """A value of `metric` with the sign that makes more better."""
        return value if self.higher_is_better else -value
