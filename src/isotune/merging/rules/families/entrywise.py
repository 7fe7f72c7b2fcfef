"""Rules on single entries: each change is made sparse, then every entry is merged by itself.

The weights are walked in blocks of rows, so that a block of each model and the result are all that is in memory,
also where the changes are factored. What is drawn is drawn row after row, whatever the size of a block.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial, reduce
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from isotune.linalg.change import Change
from isotune.linalg.low_rank import Factored
from isotune.merging.contract import Aligned, Rule

Elect = Literal["total", "frequency", "weighted"]
Average = Literal["mean", "count", "sum", "max"]
Step = Callable[[Tensor], Tensor]
"""Makes a block of rows (b, in) of one model's change sparse; called on its blocks in their order."""

BLOCK = 2**17
"""Entries of each model in a block. However many models there are, so that a product of factors has the same bits in
the walk that finds a threshold and in the walk that applies it."""
ELECT = (
    "What elects an entry's sign: the sum, the number of models (the sum where as many say + as -), or the weighted "
    "sum. A weight below 0 turns signs."
)
AVERAGE = (
    "Of the models that agree: the weighted mean; the weighted sum over their number, which weights that sum to 1 "
    "shrink (PEFT's); the weighted sum; or the largest."
)
UNBIASED = "Divide what is kept by its probability, so that the mean over seeds is the change itself."


class Entrywise(Rule):
    """Each change is made sparse, then the weighted sum is taken."""

    exact_rank: ClassVar[bool] = False

    scale: float = Field(1.0, description="Factor on the merged change.")

    @abstractmethod
    def steps(self, site: Aligned, surveyed: Any) -> Sequence[Step]:
        """What makes each model's change sparse, one for each model."""

    def combine(self, blocks: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The merged block (rows, columns), from each model's block of the same rows."""
        return sum_of(blocks, weights)

    def merge(self, site: Aligned, surveyed: Any) -> Change:
        steps = self.steps(site, surveyed)
        dtype = reduce(torch.promote_types, [_a_tensor(change).dtype for change in site.changes])
        shape = site.changes[0].shape
        merged = _a_tensor(site.changes[0]).new_empty(_rows_and_columns(shape), dtype=dtype)
        for rows, blocks in walk(site.changes):
            sparse = [step(block.to(dtype)) for step, block in zip(steps, blocks, strict=True)]
            merged[rows] = self.combine(sparse, site.weights).mul_(self.scale)
        return merged.view(shape)


class Elected(Entrywise):
    """Each change is made sparse, then each entry's sign is elected, and the models that agree are averaged."""

    elect: Elect = Field("total", description=ELECT)
    average: Average = Field("mean", description=AVERAGE)

    def combine(self, blocks: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        return agreed(blocks, weights, self.elect, self.average)


def walk(changes: Sequence[Change]) -> Iterator[tuple[slice, list[Tensor]]]:
    """Blocks (rows, columns) of the same rows of all changes as matrices; a tensor of one dimension is one row."""
    rows, columns = _rows_and_columns(changes[0].shape)
    views = [c if isinstance(c, Factored) else c.reshape(rows, columns) for c in changes]
    step = max(1, BLOCK // max(1, columns))
    for start in range(0, rows, step):
        block = slice(start, min(start + step, rows))
        yield block, [v.B[block] @ v.A if isinstance(v, Factored) else v[block] for v in views]


def sum_of(blocks: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """`Σ w_i x_i`, for blocks of one shape."""
    total = torch.zeros_like(blocks[0])
    for x, w in zip(blocks, weights, strict=True):
        total.add_(x, alpha=w)
    return total


def agreed(blocks: Sequence[Tensor], weights: Sequence[float], elect: Elect, average: Average) -> Tensor:
    """The disjoint average of TIES, in the blocks' shape: over the models whose weighted entry has the elected sign.

    Where no sign is elected, because the sum is 0, so is the result. A tie by frequency is decided by the sum. Hence
    turning all signs turns the result, and a model of weight 0 has no say.
    """
    signs = [math.copysign(1.0, w) if w else 0.0 for w in weights]
    election = sum_of(blocks, weights if elect == "weighted" else signs).sign_()
    if elect == "frequency":
        election.add_(sum_of([x.sign() for x in blocks], signs), alpha=2).sign_()
    merged, share = torch.zeros_like(election), torch.zeros_like(election)
    for x, w, sign in zip(blocks, weights, signs, strict=True):
        agreeing = (x * election).mul_(sign).clamp_(min=0)
        if average == "max":
            torch.maximum(merged, agreeing.mul_(abs(w)), out=merged)
            continue
        merged.add_(agreeing, alpha=abs(w))
        if average != "sum":
            share.add_(agreeing.sign_(), alpha=abs(w) if average == "mean" else 1.0)
    if average in ("mean", "count") and any(weights):
        # A share that is not 0 is at least the smallest weight.
        merged.div_(share.clamp_(min=min(abs(w) for w in weights if w) if average == "mean" else 1.0))
    return merged.mul_(election)


def drawn(x: Tensor, keep: float | Tensor, generator: torch.Generator, unbiased: bool) -> Tensor:
    """x (any shape), each entry kept with probability `keep`, else 0; divided by `keep` if its mean shall be x.

    Drawn on the CPU, in fp32, whatever the device and the dtype of x.
    """
    mask = (torch.rand(x.shape, generator=generator, dtype=torch.float32).to(x.device) < keep).to(x.dtype)
    return mask.mul_(x).div_(keep) if unbiased else mask.mul_(x)


def dropping(site: Aligned, keep: float, unbiased: bool) -> list[Step]:
    """For each model, the step that drops entries at random; drawn for its name at this site."""
    return [partial(drawn, keep=keep, generator=site.generator(name), unbiased=unbiased) for name in site.names]


def _a_tensor(change: Change) -> Tensor:
    return change.B if isinstance(change, Factored) else change


def _rows_and_columns(shape: Sequence[int]) -> tuple[int, int]:
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))
