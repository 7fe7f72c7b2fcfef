"""What `train` and `evaluate` share: a task's model, its examples, and a trainer around them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import transformers

from isotune.errors import IsotuneError, OptionError, nearest
from isotune.folders import TASK
from isotune.training.data import Row
from isotune.training.models import own_labels
from isotune.training.recipe import Recipe
from isotune.training.tasks.by_label import ByLabel
from isotune.training.tasks.collator import Example
from isotune.training.tasks.names import TASKS, metric_of
from isotune.training.trainer import AdapterTrainer, Along


@dataclass(frozen=True)
class TaskSpec:
    """What a saved adapter needs, beside its weights, to be used again; kept as task.json beside them."""

    task: str
    model: str
    labels: list[str]
    pooling: str
    max_length: int | None
    separator: str
    dtype: str
    backbone: str | None = "backbone"
    """What the classifiers of version 0.1.0 call their backbone; None since."""
    quantization: str | None = None
    """How the base was quantised."""
    dpo_beta: float = 0.1
    """Of a preference."""
    packing: bool = False
    """Whether prompts and chats share sequences."""
    pairs: bool = False
    """Whether two columns of text are a pair to the tokenizer; version 0.1.0 joined them by the separator."""
    image_size: int | None = None
    """Height and width of images in pixels; None: what the image processor makes of them."""
    max_seconds: float | None = None
    """Where clips of sound are cut."""
    positive: str | None = None
    """Of two labels the one that F1 is of; None: the second."""
    metric: str | None = None
    """What the run is judged by; None: the task's own."""

    @classmethod
    def of(cls, recipe: Recipe, labels: list[str], positive: str | None = None) -> TaskSpec:
        """The part of a recipe that outlives the training. Raises OptionError for a metric that is none."""
        data = recipe.data
        return cls(
            recipe.task, recipe.model, labels, recipe.pooling, data.max_length, data.separator, recipe.dtype, None,
            recipe.quantization, recipe.dpo_beta, data.packing, True, data.image_size, data.max_seconds,
            positive, metric_of(recipe.task, recipe.metric),
        )  # fmt: skip

    @classmethod
    def plain(cls, task: str, model: str) -> TaskSpec:
        """Of a model that no run of ours made: its own labels, and everything else by default.

        Raises OptionError for an unknown task.
        """
        if task not in TASKS:
            raise OptionError(f"task {task!r} is unknown.{nearest(task, TASKS)} The tasks are: {', '.join(TASKS)}")
        labels = own_labels(model) if TASKS[task].named else []
        return cls(
            task, model, labels, pooling="auto", max_length=None, separator="\n", dtype="float32", backbone=None,
            pairs=True,
        )  # fmt: skip

    @classmethod
    def read(cls, adapter: Path) -> TaskSpec:
        """Read it back. Raises IsotuneError where the adapter was not saved by `isotune train`."""
        file = adapter / TASK
        try:
            spec = cls(**json.loads(file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise IsotuneError(
                f"{adapter} has no {TASK}: not a run's folder, nor an adapter that isotune train saved"
            ) from None
        except (OSError, ValueError, TypeError) as error:
            raise IsotuneError(f"{file} cannot be read: {error}") from None
        if spec.task not in TASKS:
            raise IsotuneError(f"{file} names the task {spec.task!r}; isotune knows: {', '.join(TASKS)}")
        return spec

    @property
    def positive_number(self) -> int:
        """The place of `positive` among the labels."""
        return 1 if self.positive is None else self.labels.index(self.positive)

    @property
    def judged_by(self) -> str:
        """The name of the metric."""
        return metric_of(self.task, self.metric)

    def to_json(self) -> str:
        """The file's text."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"


class Session:
    """A pretrained model for a task, with its tokenizer or processor; `spec` says what the defaults came to."""

    def __init__(self, spec: TaskSpec) -> None:
        self.task = TASKS[spec.task]
        self.model, self.head, spec = self.task.load(spec)
        self.tokenizer = self.task.processor(spec, self.model)
        self.spec = replace(spec, max_length=_max_length(spec, self.model.config))
        self.collator = self.task.collator(self.tokenizer)
        self.by_label: ByLabel = {}  # of the rows that its trainers measured last

    def measure(self, prediction: transformers.EvalPrediction) -> dict[str, float]:
        """The task's metrics of what a trainer kept; those of each label stay in `by_label`."""
        self.by_label = self.task.by_label(prediction, self.spec)
        return self.task.measured(prediction, self.spec)

    def examples(self, rows: Sequence[Row]) -> list[Example]:
        """Tokenise rows for the task."""
        return self.task.examples(rows, self.tokenizer, self.spec)

    def trainer(
        self,
        arguments: transformers.TrainingArguments,
        train: Sequence[Example] = (),
        validation: Sequence[Example] = (),
        callbacks: Sequence[transformers.TrainerCallback] = (),
        optimizer: Mapping[str, Any] | None = None,
        along: Along | None = None,
    ) -> AdapterTrainer:
        """A trainer that measures what the task asks for, with the optimizer of a recipe."""
        return AdapterTrainer(
            model=self.model,
            args=arguments,
            data_collator=self.collator,
            train_dataset=list(train) or None,
            eval_dataset=list(validation) or None,
            compute_metrics=self.measure,
            preprocess_logits_for_metrics=self.task.reduced,
            callbacks=callbacks,
            base_model=self.spec.model,
            chosen_optimizer=optimizer,
            along=along,
            asking=lambda model, examples, count: self.task.measured_asking(
                model, examples, self.tokenizer, self.spec, count
            ),
            around_training=self.task.around_training,
            task_loss=lambda model, inputs: self.task.loss(model, inputs, self.spec),
        )


def _max_length(spec: TaskSpec, config: Any) -> int:
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if spec.max_length is None:
        return min(256, limit or 256)
    if limit and spec.max_length > limit:
        raise IsotuneError(f"data.max_length is {spec.max_length}, but {spec.model} reads at most {limit} tokens")
    return spec.max_length
