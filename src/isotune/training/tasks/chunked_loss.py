"""The loss of a language model from chunks of its rows, so that no batch of logits, nor of their gradients, is kept.

Within the context the model's output head hands on what it was given, and the loss is torch's `linear_cross_entropy`
of that and of the head's weight. What a model does between its head and its loss (scaled or capped logits) would be
lost: such a model is found by trying both on a few tokens, and keeps its own way; so does a batch with few logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from isotune.linalg.precision import compute_dtype
from isotune.linalg.thin import without_autocast
from isotune.training.tasks.collator import IGNORED

LARGE = 2**24
"""Logits in a chunk; a batch with fewer is one."""


@contextmanager
def chunked_loss(model: Any, large: int = LARGE) -> Iterator[bool]:
    """Within the context the training loss of a causal language model comes in chunks of `large` logits.

    Gives whether it does: not where torch has no such loss, the head is adapted or not linear, or the model's loss is
    another than that of its head.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not hasattr(F, "linear_cross_entropy") or type(head) is not nn.Linear or "forward" in vars(head):
        yield False
        return
    chunks = _Chunks(model, head, large)
    if not chunks.agree():
        yield False
        return
    with chunks.installed():
        yield True


class _Chunks:
    """A model and its head, and the two functions that stand in for theirs."""

    def __init__(self, model: Any, head: nn.Linear, large: int) -> None:
        self.model, self.head, self.large = model, head, large
        self.own_loss = model.loss_function
        self.trying = False
        self.probe: Tensor | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Put them in place within the context."""
        vars(self.head)["forward"] = self._hand_on
        self.model.loss_function = self._loss
        try:
            yield
        finally:
            del vars(self.head)["forward"]
            self.model.loss_function = self.own_loss

    @torch.no_grad()
    def agree(self) -> bool:
        """Whether the loss of a few tokens is the model's own, and large logits reach it as they are, or scaled."""
        ids = torch.arange(8, device=self.head.weight.device)[None] % self.head.out_features
        training = self.model.training
        self.model.eval()
        try:
            own = self.model(input_ids=ids, labels=ids).loss
            self.trying = True
            with self.installed():
                ours = self.model(input_ids=ids, labels=ids).loss
                self.probe = torch.linspace(-1e3, 1e3, 8 * self.head.in_features, device=ids.device).view(1, 8, -1)
                bent = self.model(input_ids=ids, labels=ids).loss
        except (RuntimeError, TypeError, ValueError):  # it takes other inputs, or shapes its logits by their number
            return False
        finally:
            self.trying, self.probe = False, None
            self.model.train(training)
        tolerance = max(1e-5, 4 * torch.finfo(self.head.weight.dtype).eps)
        return bool((own - ours).abs() <= tolerance * own.abs()) and bool(bent <= tolerance)

    def _hand_on(self, rows: Tensor) -> Tensor:
        V = self.head.out_features
        logits = rows.numel() // rows.shape[-1] * V
        if self.probe is not None:
            return self.probe.to(rows.dtype)
        if self.trying or (self.model.training and logits > self.large):
            return rows
        return F.linear(rows, self.head.weight, self.head.bias)

    def _loss(self, logits: Tensor, labels: Tensor, num_items_in_batch: Any = None, **kwargs: Any) -> Tensor:
        V = self.head.out_features
        if self.probe is not None:
            # How far what came through is from a multiple of what was handed on.
            given, came = self.probe.flatten().double(), logits.flatten().double()
            return torch.linalg.vector_norm(came - given * (came @ given) / (given @ given)) / came.norm()
        if logits.shape[-1] == V:
            return self.own_loss(logits=logits, labels=labels, num_items_in_batch=num_items_in_batch, **kwargs)
        rows = logits[..., :-1, :].reshape(-1, logits.shape[-1])
        targets = labels[..., 1:].reshape(-1).to(rows.device)
        dtype = compute_dtype(self.head.weight)
        b = self.head.bias
        options = torch.nn.LinearCrossEntropyOptions(
            acc_dtype=torch.float32, batch_chunk_size=max(64, self.large // V), chunking_method=None
        )
        with without_autocast(rows):
            # In low precision a sum over a batch would be rounded to three digits.
            losses = F.linear_cross_entropy(
                rows.to(dtype),
                self.head.weight.to(dtype),
                targets,
                linear_bias=None if b is None else b.to(dtype),
                reduction="none",
                ignore_index=IGNORED,
                options=options,
            )
        items = (targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        return losses.float().sum() / (items.to(losses.device) if isinstance(items, Tensor) else items)
