"""What a model still does after it was trained for something else: the base on held-out rows, before and after.

Of an encoder: the test accuracy of a linear probe, fitted anew on the model's features of another task's rows, and
how much its embeddings of the test texts are like the base's. Of a causal language model: its perplexity on general
text. Of an encoder-decoder: that of another task's completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from isotune.errors import DataError, DivergedError, IsotuneError, OptionError
from isotune.model.batches import evaluating
from isotune.model.switch import tokens
from isotune.training.classifiers import is_classifier
from isotune.training.data import Row, load_rows, load_splits, sample_rows
from isotune.training.probe import extract_features, fit_probe
from isotune.training.progress import quiet_libraries
from isotune.training.recipe import DataSettings
from isotune.training.recipe import ForgettingSettings as ForgettingSettings
from isotune.training.session import Session, TaskSpec
from isotune.training.tasks.causal import causal_metrics, token_losses
from isotune.training.tasks.collator import Collator, Example
from isotune.training.tasks.names import TASKS

HIGHER_IS_BETTER = {"probe_accuracy": True, "similarity": True, "perplexity": False}
"""The measures."""


def settings_for(task: str, rows: str, **columns: str | None) -> ForgettingSettings:
    """Settings for a single source: of a classification's rows a part is held out, causal-lm is measured on all."""
    return ForgettingSettings(**{"train" if TASKS[task].probed else "test": rows, **columns})


class Forgetting:
    """Held-out rows, what the base does on them, and what any model trained from it does.

    The rows are read and the base is measured once, so that each further model costs its own pass (and probe) alone.
    """

    base: dict[str, float]
    """The base's measures: `probe_accuracy` and `similarity` (1), or `perplexity`."""

    def __init__(self, settings: ForgettingSettings, spec: TaskSpec) -> None:
        """Read the rows, load the pretrained model and measure it; the model is let go of.

        Args:
            settings: The rows and their columns.
            spec: What the runs are trained for (`TaskSpec.of(recipe, labels)`, or `TaskSpec.read` of what a run
                left), of which the model, the task, the pooling and the data type matter.

        Raises:
            DataError: Rows that cannot be read, miss a column, or have no text.
            OptionError: Settings for the other task.
        """
        quiet_libraries()
        self.settings, self.task, self.name = settings, spec.task, spec.model
        if TASKS[spec.task].probed and not TASKS[spec.task].named:  # a probe tells labels apart, whatever was learnt
            spec = replace(spec, task="classification")
        train, test, labels = _read(settings, spec.task)
        spec = replace(spec, labels=labels, max_length=settings.max_length, separator=settings.separator, metric=None)
        with torch.random.fork_rng():  # of a head that nothing uses
            session = Session(spec)
        if (device := torch.accelerator.current_accelerator(check_available=True)) is not None:
            session.model.to(device)
        self._collator: Collator = session.collator
        self._train, self._test = session.examples(train), session.examples(test)
        self._classes = len(labels)
        self._embeddings: Tensor | None = None  # shape (n, hidden): of the first model that is measured, the base
        self.base = self.measure(session.model)

    def measure(self, model: nn.Module) -> dict[str, float]:
        """The same measures of a model as it is now, with the adapters that are in use; its mode is left as it was.

        Args:
            model: The model of a finished run (`Result.model`, or that of `open_trained`).

        Raises:
            IsotuneError: The model is for the other task, or of another width than the base.
            DivergedError: It answers with values that are not finite.
        """
        probed = TASKS[self.task].probed
        if is_classifier(model) != probed:
            wanted = "a classifier" if probed else "a language model"
            raise IsotuneError(
                f"forgetting of a {self.task} run is measured on {wanted}, which {type(model).__name__} is not"
            )
        return self._probed(model) if probed else {"perplexity": self._perplexity(model)}

    def _probed(self, model: Any) -> dict[str, float]:
        """The probe's accuracy, and the mean cosine of the embeddings with the base's."""
        test, labels = self._features(model, self._test)
        base = self._embeddings = test if self._embeddings is None else self._embeddings
        if test.shape != base.shape:
            raise IsotuneError(
                f"the model's features have {test.shape[1]} dimensions and those of {self.name} have "
                f"{base.shape[1]}: it was trained from another model"
            )
        probe = fit_probe(*self._features(model, self._train), self._classes, strengths=(self.settings.l2,))
        # One root of the product: it makes the cosine of a vector with itself exactly 1.
        cosines = (test * base).sum(1) / (test.square().sum(1) * base.square().sum(1)).sqrt().clamp_min(1e-30)
        return {"probe_accuracy": probe.metrics(test, labels)["accuracy"], "similarity": float(cosines.mean())}

    def _features(self, model: Any, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        features, labels = extract_features(model, examples, self._collator, self.settings.batch_size)
        if not torch.isfinite(features).all():
            raise DivergedError("the model's features are not finite any more; it cannot be measured")
        return features, labels

    def _perplexity(self, model: Any) -> float:
        device = next(model.parameters()).device
        reduced = TASKS[self.task].reduced or token_losses
        # Rows of one length side by side need no padding.
        examples = sorted(self._test, key=lambda example: len(example["input_ids"]))
        sums = []
        with torch.no_grad(), evaluating(model):
            for start in range(0, len(examples), self.settings.batch_size):
                batch = self._collator(examples[start : start + self.settings.batch_size])
                labels = batch.pop("labels").to(device)
                tokens(model, batch.get("attention_mask"))
                inputs = {name: tensor.to(device) for name, tensor in batch.items()}
                if model.config.is_encoder_decoder:  # the decoder reads them, one place later
                    inputs["labels"] = labels
                sums.append(reduced(model(**inputs).logits, labels).cpu())
        found = np.asarray(torch.cat(sums))
        if not np.isfinite(found).all():
            raise DivergedError("the model's losses are not finite any more; it cannot be measured")
        return causal_metrics(found)["perplexity"]


def _read(settings: ForgettingSettings, task: str) -> tuple[list[Row], list[Row], list[str]]:
    """Rows to fit a probe on, rows to measure on, and the label names; of what writes, rows to measure on alone."""
    data = DataSettings(
        train=settings.train or str(settings.test),
        validation=None if isinstance(settings.test, str) else settings.test,
        test=settings.test if isinstance(settings.test, str) else None,
        subset=settings.subset,
        text=settings.text,
        label=settings.label,
        prompt=settings.prompt,
        completion=settings.completion,
        separator=settings.separator,
        max_train_rows=settings.max_rows,
        max_eval_rows=settings.max_rows,
    )
    probed = TASKS[task].probed
    if probed and settings.train is None:
        raise OptionError("forgetting.train is missing: a classifier is probed on another task's rows with labels")
    if not probed and (settings.train is not None or not isinstance(settings.test, str)):
        raise OptionError(
            f"forgetting of a {task} run is its perplexity on other rows: forgetting.test names the text (of a "
            "seq2seq-lm, prompts and completions), and there is no forgetting.train"
        )
    try:
        if not probed:
            rows = load_rows(data.train, data, task)
            return [], sample_rows(rows, settings.max_rows, settings.seed), []
        splits = load_splits(data, task, settings.seed)
    except DataError as error:
        raise DataError(f"forgetting: {error}") from None
    return splits.train, splits.test or splits.validation, splits.labels
