"""Batches of token sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Example = dict[str, Any]
"""`input_ids` (a list) and `labels` (a number, or a list as long as `input_ids`); or `image` or `audio`
and `labels`."""
IGNORED = -100
"""The label of tokens that are not trained on."""


class Collator:
    """Pads a batch of examples on the right to its longest."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` of shape (batch, longest); `token_type_ids` and `labels` where given."""
        longest = max(len(example["input_ids"]) for example in examples)
        batch = {
            "input_ids": padded([example["input_ids"] for example in examples], longest, self.pad_token_id),
            "attention_mask": padded([[1] * len(example["input_ids"]) for example in examples], longest, 0),
        }
        if "token_type_ids" in examples[0]:
            batch["token_type_ids"] = padded([example["token_type_ids"] for example in examples], longest, 0)
        labels = [example["labels"] for example in examples if "labels" in example]
        if labels:
            numbers = isinstance(labels[0], int | float)
            batch["labels"] = torch.tensor(labels) if numbers else padded(labels, longest, IGNORED)
        return batch


def padded(rows: list[list[int]], length: int, value: int) -> Tensor:
    """The rows side by side, shape (rows, length), what is missing at their ends as `value`."""
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])
