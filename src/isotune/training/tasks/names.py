"""The tasks by name."""

from __future__ import annotations

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
