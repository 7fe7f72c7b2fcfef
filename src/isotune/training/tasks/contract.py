"""What every task says of itself; `train`, `evaluate`, `compare` and the rest ask here, and nowhere else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import transformers

from isotune.errors import DataError
from isotune.intervals import wilson
from isotune.statistics.likelihood import Expectation
from isotune.training.models import load_tokenizer
from isotune.training.tasks.by_label import ByLabel
from isotune.training.tasks.collator import Collator, Example

if TYPE_CHECKING:
    from isotune.training.data import Row
    from isotune.training.recipe import DataSettings
    from isotune.training.session import TaskSpec


LOWER_IS_BETTER = ("loss", "perplexity", "rmse")
"""Of all tasks' metrics."""


class Task(ABC):
    """A task: the columns it reads, the model it loads, and what is measured of it."""

    answer: ClassVar[str]
    """The key of a `Row` that holds what is to be learnt; rows without it can be predicted, and not measured."""
    metrics: ClassVar[tuple[str, ...]]
    """What is measured, the name of the mean loss among it."""
    metric: ClassVar[str]
    """What methods are compared by, where a recipe names no other of `metrics`."""
    named: ClassVar[bool] = True
    """Whether it has labels with names."""
    has_reference: ClassVar[bool] = False
    """Whether its `loss` asks the model without its adapter, too."""
    counted: ClassVar[tuple[str, ...]] = ()
    """Those of `metrics` that are the share of rows that are right."""
    asked: ClassVar[tuple[str, ...]] = ()
    """Those of `metrics` that take text that the model writes, measured only where a run is judged by them."""
    slow: ClassVar[tuple[str, ...]] = ()
    """The keys of a `Row` whose cells take long to decode: they are, once it is known which rows are used."""
    rows_at_a_time: ClassVar[int] = 64
    """In evaluation, where nobody says."""
    writes: ClassVar[bool] = False
    """Whether what it predicts is text that it generates."""
    probable: ClassVar[bool] = False
    """Whether it gives each label a probability."""
    probed: ClassVar[bool] = False
    """Whether a linear probe on the frozen model's features is a baseline, and a start for its head."""
    expectation: ClassVar[Expectation] = "sample"
    """Over which labels a Fisher information is taken, unless one says else."""

    @abstractmethod
    def columns(self, data: DataSettings, found: Sequence[str]) -> dict[str, list[str]]:
        """By key of a `Row` the columns it is made of: as named in the recipe, else guessed from those there are."""

    def cell(self, key: str, value: Any) -> Any:
        """A cell as the row has it; by default text. Raises ValueError, whose message completes "the row has ..."."""
        return as_text(value)

    def open_cell(self, key: str, value: Any) -> Any:
        """The same of a row that is to be predicted, where that asks for less."""
        return self.cell(key, value)

    def labels(self, rows: Sequence[Row], data: DataSettings) -> list[str]:
        """The label names in the order of their numbers. Raises DataError where the rows do not make a task."""
        return []

    def positive(self, rows: Sequence[Row], labels: Sequence[str], data: DataSettings) -> str | None:
        """Of two labels the one that `f1` is of; None where the task has no such label. Raises DataError as above."""
        if data.positive is not None:
            raise DataError(f"data.positive is {data.positive!r}, and this task does not tell two labels apart")
        return None

    def check(self, rows: Sequence[Row], labels: Sequence[str], where: str) -> None:  # noqa: B027
        """Raise DataError for the first row whose answer the training rows, with these labels, do not know."""

    def is_one_document(self, rows: Sequence[Row]) -> bool:
        """Whether the rows are one text, whose end is held out in place of some of the rows."""
        return False

    @abstractmethod
    def load(self, spec: TaskSpec) -> tuple[Any, list[str], TaskSpec]:
        """The pretrained model, the names of its head's modules, and the spec with what "auto" came to."""

    def processor(self, spec: TaskSpec, model: Any) -> Any:
        """What makes inputs of rows: by default the tokenizer, whose padding token the model is told."""
        tokenizer = load_tokenizer(spec.model)
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        return tokenizer

    def collator(self, processor: Any) -> Any:
        """What makes batches of examples."""
        return Collator(processor.pad_token_id)

    @abstractmethod
    def examples(self, rows: Sequence[Row], tokenizer: Any, spec: TaskSpec) -> list[Example]:
        """The rows as tokens, at most `spec.max_length` of them."""

    def loss(self, model: Any, inputs: Mapping[str, Any], spec: TaskSpec) -> tuple[Any, dict[str, Any]] | None:
        """The loss of a batch and the model's outputs; None: the model's own."""
        return None

    def around_training(self, model: Any) -> AbstractContextManager[Any]:
        """A context for the steps of a training; by default one that does nothing."""
        return nullcontext()

    reduced: ClassVar[Callable[..., Any] | None] = None
    """What the trainer keeps of each batch's logits, as a function of logits and labels; None: the logits."""

    @abstractmethod
    def measured(self, prediction: transformers.EvalPrediction, spec: TaskSpec) -> dict[str, float]:
        """`metrics` of what the trainer kept."""

    def measured_asking(
        self, model: Any, examples: Sequence[Example], processor: Any, spec: TaskSpec, batch_size: int
    ) -> dict[str, float]:
        """Of the metrics in `asked` the one that the run is judged by; nothing where it is judged by another."""
        return {}

    def intervals(self, metrics: Mapping[str, Any], rows: int, prefix: str = "") -> dict[str, Any]:
        """Of those metrics that are shares of so many rows their 95 % intervals, as `accuracy_interval`."""
        names = [f"{prefix}{name}" for name in self.counted if f"{prefix}{name}" in metrics]
        return {f"{name}_interval": list(wilson(metrics[name], rows)) for name in names}

    def by_label(self, prediction: transformers.EvalPrediction, spec: TaskSpec) -> ByLabel:
        """The same for each label, where the task has labels."""
        return {}

    def constant(self, train: Sequence[Row], rows: Sequence[Row]) -> dict[str, float]:
        """What always the same answer, that of `train`, scores on the rows; keys end with the metric's name."""
        return {}

    @abstractmethod
    def predicted(self, rows: Sequence[Row], scores: np.ndarray, spec: TaskSpec) -> list[dict[str, Any]]:
        """Each row with what the model says of it; `scores` is what the trainer kept, one entry a row."""

    def probabilities(self, scores: np.ndarray, spec: TaskSpec) -> list[dict[str, float]]:
        """Those of all labels, for each row, where the task is `probable`."""
        raise NotImplementedError

    def of_trainer(self, found: Mapping[str, float], prefix: str) -> dict[str, float]:
        """Of a trainer's metrics those of the task, without its timings."""
        names = [f"{prefix}_{name}" for name in self.metrics]
        return {name: found[name] for name in names if name in found}


def higher_is_better(metric: str) -> bool:
    """Whether more of a metric is better."""
    return metric not in LOWER_IS_BETTER


def signed(metric: str, value: float) -> float:
    """A metric's value with the sign that makes more better."""
    return value if higher_is_better(metric) else -value


def named_or_guessed(
    named: str | Sequence[str] | None, found: Sequence[str], usual: Sequence[str | tuple[str, ...]]
) -> list[str]:
    """The columns that the recipe names, else the first of the usual ones that are there, else the first usual."""
    if named is not None:
        return [named] if isinstance(named, str) else list(named)
    choices = [[one] if isinstance(one, str) else list(one) for one in usual]
    return next((choice for choice in choices if set(choice) <= set(found)), choices[0])


def as_text(value: Any) -> str:
    """A cell as text. Raises ValueError where there is none in it."""
    if isinstance(value, (list, dict)):
        raise ValueError(f"a {type(value).__name__} and no text")
    text = "" if value is None else str(value)
    if not text.strip():
        raise ValueError("nothing")
    return text


def as_words(value: Any) -> list[str]:
    """A cell as a list of words, or of tags. Raises ValueError where it is none."""
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"{_short(value)} and no list of words")
    return [as_text(word) for word in value]


def as_number(value: Any) -> float:
    """A cell as a number. Raises ValueError where it is none, or not finite."""
    try:
        number = float(as_text(value))
    except ValueError:
        raise ValueError(f"{_short(value)} and no number") from None
    if not np.isfinite(number):
        raise ValueError(f"{_short(value)}, which is not finite,")
    return number


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."
