"""Causal language modelling: prompt and completion, or plain text in blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from torch import Tensor

from isotune.errors import DataError
from isotune.training.models import load_causal
from isotune.training.tasks.collator import IGNORED
from isotune.training.tasks.contract import Example, Task

if TYPE_CHECKING:
    from isotune.training.data import Row
    from isotune.training.recipe import DataSettings
    from isotune.training.session import TaskSpec


def token_losses(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Per row, the summed loss of its trained tokens and their number, shape (batch, 2)."""
    scores = logits[0] if isinstance(logits, tuple) else logits
    targets = labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(
        scores[:, :-1].float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none"
    )
    return torch.stack([losses.double().sum(1), (targets != IGNORED).double().sum(1)], dim=1)


class CausalLM(Task):
    """Rows of `prompt` and `completion`, or of `text`."""

    metrics = ("perplexity", "loss")
    metric = "loss"
    higher_is_better = False
    reduced = staticmethod(token_losses)

    def columns(self, data: DataSettings) -> dict[str, list[str]]:
        """Prompt and completion, where they are named, else the text."""
        if data.prompt is not None and data.completion is not None:
            return {"prompt": [data.prompt], "completion": [data.completion]}
        return {"text": [data.text] if isinstance(data.text, str) else data.text}

    def is_one_document(self, rows: Sequence[Row]) -> bool:
        """A single row of text."""
        return len(rows) == 1 and "text" in rows[0]

    def load(self, spec: TaskSpec) -> tuple[Any, list[str], TaskSpec]:
        """A language model, which has no head that would be trained by itself."""
        return load_causal(spec.model, spec.dtype), [], spec

    def examples(self, rows: Sequence[Row], tokenizer: Any, spec: TaskSpec) -> list[Example]:
        """Prompt and completion with the prompt masked, or texts packed into blocks of `spec.max_length`.

        Raises:
            DataError: The tokenizer has no end token to close a completion or a text with.
        """
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no end-of-text token, which a causal-lm task needs")
        if not rows:
            return []
        assert spec.max_length is not None
        if "prompt" in rows[0]:
            return _completions(rows, tokenizer, spec.max_length, spec.separator)
        return _blocks(rows, tokenizer, spec.max_length)

    def measured(self, prediction: transformers.EvalPrediction) -> dict[str, float]:
        """Of the rows' `token_losses`."""
        return causal_metrics(np.asarray(prediction.predictions))

    def predicted(self, rows: Sequence[Row], scores: np.ndarray, spec: TaskSpec) -> list[dict[str, Any]]:
        """Each row with its loss."""
        return [{**row, "loss": float(s[0] / max(s[1], 1))} for row, s in zip(rows, scores, strict=True)]


def _completions(rows: Sequence[Row], tokenizer: Any, max_length: int, separator: str) -> list[Example]:
    """Too long a row keeps its completion, and loses the start of its prompt first."""
    prompts = tokenizer([row["prompt"] + separator for row in rows])["input_ids"]
    completions = tokenizer([row["completion"] for row in rows], add_special_tokens=False)["input_ids"]
    examples: list[Example] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        if prompt and prompt[-1] == tokenizer.eos_token_id:  # some tokenizers close every text
            prompt = prompt[:-1]
        answer = [*completion, tokenizer.eos_token_id][: max_length - 1]
        asked = prompt[-(max_length - len(answer)) :]
        examples.append({"input_ids": asked + answer, "labels": [IGNORED] * len(asked) + answer})
    return examples


def _blocks(rows: Sequence[Row], tokenizer: Any, max_length: int) -> list[Example]:
    """All texts, each closed by the end token, as one stream cut every `max_length` tokens."""
    stream: list[int] = []
    for ids in tokenizer([row["text"] for row in rows])["input_ids"]:
        stream.extend(ids if ids and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id])
    blocks = [stream[start : start + max_length] for start in range(0, len(stream), max_length)]
    return [{"input_ids": block, "labels": block} for block in blocks if len(block) > 1]


def causal_metrics(sums: np.ndarray) -> dict[str, float]:
    """Loss per trained token and its perplexity, from rows of (summed loss, tokens)."""
    loss = float(sums[:, 0].sum() / max(sums[:, 1].sum(), 1))
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
