"""The tasks by name."""

from __future__ import annotations

from isotune.errors import OptionError, nearest
from isotune.training.tasks.audio_classification import AudioClassification
from isotune.training.tasks.causal import CausalLM
from isotune.training.tasks.classification import Classification
from isotune.training.tasks.contract import Task
from isotune.training.tasks.images import ImageClassification
from isotune.training.tasks.preference import Preference
from isotune.training.tasks.regression import Regression
from isotune.training.tasks.seq2seq import Seq2SeqLM
from isotune.training.tasks.token_classification import TokenClassification

TASKS: dict[str, Task] = {
    "classification": Classification(),
    "regression": Regression(),
    "token-classification": TokenClassification(),
    "image-classification": ImageClassification(),
    "audio-classification": AudioClassification(),
    "causal-lm": CausalLM(),
    "seq2seq-lm": Seq2SeqLM(),
    "preference": Preference(),
}
"""Recipes and task.json name them; both are checked when they are read."""


def metric_of(task: str, named: str | None) -> str:
    """What runs of a task are judged by: the metric that is named, else the task's own.

    Raises OptionError for a metric that the task does not measure.
    """
    known = TASKS[task].metrics
    if named is None or named in known:
        return named or TASKS[task].metric
    raise OptionError(f"{task} has no metric {named!r}.{nearest(named, known)} Its metrics are: {', '.join(known)}")
