"""The change of a weight, factored or dense: what merging adds up and diagnoses measure."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from isotune.linalg.low_rank import SVD, Factored, dense_svd, inner, norm, rounding, svd, weighted_sum

Change = Factored | Tensor
"""The change of one weight, W' - W, in fp32 or better: factored, or dense in the shape of the weight.

Weights of layers are matrices (out, in). Dense changes of other tensors (biases, norms, embeddings) have any shape.
"""


def dense(change: Change) -> Tensor:
    """The change as a dense tensor of its shape."""
    return change.dense() if isinstance(change, Factored) else change


def scaled(change: Change, factor: float) -> Change:
    """`factor` times the change."""
    return change.scaled(factor) if isinstance(change, Factored) else factor * change


def total(changes: Sequence[Change], weights: Sequence[float]) -> Change:
    """`Σ w_i ΔW_i`: factored where all are, by putting the factors side by side, else dense."""
    factors = [change for change in changes if isinstance(change, Factored)]
    if factors and len(factors) == len(changes):
        return weighted_sum(factors, weights)
    if not changes:
        return torch.zeros(())
    found = weights[0] * dense(changes[0])
    for change, w in zip(changes[1:], weights[1:], strict=True):
        found.add_(dense(change), alpha=w)
    return found


def size(change: Change) -> float:
    """The Frobenius norm, summed in float64."""
    if isinstance(change, Factored):
        return norm(change)
    return float(torch.linalg.vector_norm(change, dtype=torch.float64))  # which copies nothing


def product(one: Change, other: Change) -> float:
    """The Frobenius inner product, summed in float64."""
    if isinstance(one, Factored) and isinstance(other, Factored):
        return inner(one, other)
    return float((dense(one).double() * dense(other).double()).sum())


def change_svd(change: Change) -> SVD:
    """All singular triplets of a change that are not rounding."""
    return (svd(change) if isinstance(change, Factored) else dense_svd(change)).supported()


def change_values(change: Change) -> Tensor:
    """The singular values (k) of a change, descending, without those that are rounding."""
    S = svd(change).S if isinstance(change, Factored) else torch.linalg.svdvals(change)
    return S[rounding(max(change.shape), S.dtype) * S[:1] < S]
