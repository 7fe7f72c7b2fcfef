"""Intruder dimensions: leading singular vectors of the adapted weight that are like none of the base's.

    c_j = max_i |<u0_i, u_j>|  over all singular vectors u0_i of W, for the k leading u_j of W' = W + dW

Vector j is an intruder where c_j is below a threshold. Source: Shuttleworth, Andreas, Torralba and Sharma, "LoRA vs
Full Fine-tuning: An Illusion of Equivalence" (NeurIPS 2025, arXiv 2410.21228), who take k = 10, a threshold of 0.5
and the left vectors. They find that forgetting goes with these dimensions; the count alone is no verdict.

Where singular values of W lie close together their vectors turn freely in the space that they span, and c_j is small
for no reason. `window_similarity` asks how much of u_j lies in the span of all vectors of W whose singular values
are within 5 % of that of u_j; a vector that this calls new as well is new.

A rotation of the input, `W' = W R`, leaves every left vector as it was: its intruders are on the right.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from isotune.diagnostics.decompositions import Spectra, spectra
from isotune.errors import OptionError
from isotune.linalg.change import Change, size
from isotune.linalg.low_rank import SVD, Factored

Side = Literal["left", "right", "both"]

WINDOW = 0.05
THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Intruders:
    """What `find_intruders` found in one weight."""

    similarity: Tensor
    """c_j (k); on both sides the smaller of the two."""
    window: Tensor
    """The same by `window_similarity`."""
    indices: list[int]
    """The intruders, counted from 1."""
    share: float | None
    """`Σ |u_jᵀ dW|² / |dW|²` over the intruders (`|dW v_j|²` on the right); None for a change of nothing."""


def check_settings(k: int, threshold: float, side: str) -> None:
    """Raise OptionError for settings that mean nothing."""
    if k < 1:
        raise OptionError(f"k={k} is not usable: at least one singular vector must be looked at")
    if not 0 < threshold <= 1:
        raise OptionError(f"threshold={threshold:g} is not usable: cosines lie between 0 and 1")
    if side not in get_args(Side):
        raise OptionError(f"side={side!r} is unknown; choose left, right or both")


def intruder_dimensions(
    W: Tensor, change: Change, k: int = 10, threshold: float = 0.5, side: Side = "left"
) -> Intruders:
    """The intruders among the k leading singular vectors of `W + change` (out, in). Raises OptionError."""
    check_settings(k, threshold, side)
    return find_intruders(spectra(W, change, k), change, threshold, side)


def find_intruders(found: Spectra, change: Change, threshold: float = 0.5, side: Side = "left") -> Intruders:
    """The same, of weights that are decomposed already."""
    by_side = {
        s: (similarity(found, s), window_similarity(found, s)) for s in ("left", "right") if side in (s, "both")
    }
    cosines = torch.stack([own for own, _ in by_side.values()]).amin(0)
    windows = torch.stack([own for _, own in by_side.values()]).amin(0)
    indices = (cosines < threshold).nonzero().flatten().tolist()
    return Intruders(cosines, windows, [j + 1 for j in indices], _share(found.adapted, change, indices, side))


def similarity(found: Spectra, side: Literal["left", "right"] = "left") -> Tensor:
    """c_j (k): the largest cosine of each leading vector of W' with a singular vector of W."""
    own, new = (found.base.U, found.adapted.U) if side == "left" else (found.base.V, found.adapted.V)
    return (own.mT @ new).abs().amax(0).clamp(max=1.0)


def window_similarity(found: Spectra, side: Literal["left", "right"] = "left", width: float = WINDOW) -> Tensor:
    """(k): how much of each leading vector of W' lies where W's singular values are within `width` of its own."""
    own, new = (found.base.U, found.adapted.U) if side == "left" else (found.base.V, found.adapted.V)
    near = (found.base.S[:, None] - found.adapted.S).abs() <= width * found.adapted.S
    return torch.linalg.vector_norm(torch.where(near, own.mT @ new, 0), dim=0).clamp(max=1.0)


def intruder_counts(
    similarities: Iterable[Sequence[float]], thresholds: Sequence[float] = THRESHOLDS
) -> dict[float, int]:
    """How many intruders there are at each threshold, over the similarities of several weights."""
    values = [value for own in similarities for value in own]
    return {threshold: sum(value < threshold for value in values) for threshold in thresholds}


def _share(adapted: SVD, change: Change, indices: Sequence[int], side: Side) -> float | None:
    total = size(change)
    if total == 0:
        return None
    index = list(indices)
    if side == "right":
        V = adapted.V[:, index]
        hit = change.B @ (change.A @ V) if isinstance(change, Factored) else change @ V
    else:
        U = adapted.U[:, index]
        hit = (U.mT @ change.B) @ change.A if isinstance(change, Factored) else U.mT @ change
    return (float(torch.linalg.vector_norm(hit, dtype=torch.float64)) / total) ** 2
