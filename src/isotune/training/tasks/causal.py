"""The two tasks: how rows become tokens, batches, losses and metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isotune.errors import DataError
from isotune.training.data import Row

Example = dict[str, Any]
"""`input_ids` (a list) and `labels` (a number, or a list as long as `input_ids`)."""

IGNORED = -100


class Collator:
    """Pads a batch of examples on the right to its longest."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Tensors `input_ids`, `attention_mask` of shape (batch, longest), and `labels` where there are some."""
        longest = max(len(example["input_ids"]) for example in examples)
        batch = {
            "input_ids": _padded([example["input_ids"] for example in examples], longest, self.pad_token_id),
            "attention_mask": _padded([[1] * len(example["input_ids"]) for example in examples], longest, 0),
        }
        labels = [example["labels"] for example in examples if "labels" in example]
        if labels:
            numbers = isinstance(labels[0], int)
            batch["labels"] = torch.tensor(labels) if numbers else _padded(labels, longest, IGNORED)
        return batch


def _padded(rows: list[list[int]], length: int, value: int) -> Tensor:
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


def classification_examples(
    rows: Sequence[Row], tokenizer: Any, labels: Sequence[str], max_length: int
) -> list[Example]:
    """Texts cut at `max_length` tokens; labels as numbers, where the rows have labels."""
    if not rows:
        return []
    numbers = {name: number for number, name in enumerate(labels)}
    tokens = tokenizer([row["text"] for row in rows], truncation=True, max_length=max_length)["input_ids"]
    return [
        {"input_ids": ids, "labels": numbers[row["label"]]} if "label" in row else {"input_ids": ids}
        for ids, row in zip(tokens, rows, strict=True)
    ]


def causal_examples(rows: Sequence[Row], tokenizer: Any, max_length: int, separator: str = "\n") -> list[Example]:
    """Prompt and completion with the prompt masked, or texts packed into blocks of `max_length`.

    Raises:
        DataError: The tokenizer has no end token to close a completion or a text with.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-text token, which a causal-lm task needs")
    if not rows:
        return []
    if "prompt" in rows[0]:
        return _completions(rows, tokenizer, max_length, separator)
    return _blocks(rows, tokenizer, max_length)


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


def token_losses(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Per row, the summed loss of its trained tokens and their number, shape (batch, 2)."""
    scores = logits[0] if isinstance(logits, tuple) else logits
    targets = labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(
        scores[:, :-1].float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none"
    )
    return torch.stack([losses.double().sum(1), (targets != IGNORED).double().sum(1)], dim=1)


def causal_metrics(sums: np.ndarray) -> dict[str, float]:
    """Loss per trained token and its perplexity, from rows of (summed loss, tokens)."""
    loss = float(sums[:, 0].sum() / max(sums[:, 1].sum(), 1))
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
