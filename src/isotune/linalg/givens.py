"""Products of d - 1 plane transformations in ⌈log₂ d⌉ stages, applied in O(d) per row.

    R = P_1 P_2 ... P_K,   K = ⌈log₂ d⌉

Stage k transforms the planes of axes (2ˢ·2i, 2ˢ·(2i + 1)) with s = k - 1, for all i at once, each by a 2 x 2 matrix
of its own. It is a knock-out tournament: every stage halves the axes that take part, and where their number is odd,
the last one goes on by itself, so that d need be no power of two and the matrices are always d - 1. With rotations
(Givens rotations) R is orthogonal, and for any two vectors of equal length some R maps one to the other.

As an axis that has lost takes no part in later stages, a row costs d + d/2 + d/4 + ... < 2 d numbers in place of
d log d. Letters: G (d - 1, 2, 2), the matrices of stage 1, then of stage 2, and so on.
"""

from __future__ import annotations

import torch
from torch import Tensor


def givens_rotations(angles: Tensor) -> Tensor:
    """The 2 x 2 rotations (n, 2, 2) by angles (n): [[cos, -sin], [sin, cos]]."""
    c, s = angles.cos(), angles.sin()
    return torch.stack([c, -s, s, c], dim=-1).unflatten(-1, (2, 2))


def givens_product(v: Tensor, G: Tensor, transpose: bool = False) -> Tensor:
    """Compute `v R`, or `v Rᵀ`, for rows v (..., d) and matrices G (d - 1, 2, 2); the result has v's dtype."""
    stages = _stages(v.shape[-1], G.to(v.dtype))
    return _to_leaves(v, stages) if transpose else _to_root(v, stages)


def _stages(d: int, G: Tensor) -> list[Tensor]:
    """G split into the matrices of each stage."""
    sizes = []
    while d > 1:
        sizes.append(d // 2)
        d -= d // 2
    return list(G.split(sizes)) if sizes else []


def _to_root(v: Tensor, stages: list[Tensor]) -> Tensor:
    """`v R`: stage 1 first. The second axis of each plane is done, the first goes on."""
    done = []
    for g in stages:
        a, b = v[..., 0::2], v[..., 1::2]
        n = b.shape[-1]
        alone, a = a[..., n:], a[..., :n]
        done.append(a * g[:, 0, 1] + b * g[:, 1, 1])
        v = _joined(a * g[:, 0, 0] + b * g[:, 1, 0], alone)
    for b in reversed(done):
        v = _interleaved(v, b)
    return v


def _to_leaves(v: Tensor, stages: list[Tensor]) -> Tensor:
    """`v Rᵀ`: the last stage first. A plane has its first axis from the stage above and its second one from v."""
    fresh = []
    for _ in stages:
        fresh.append(v[..., 1::2])
        v = v[..., 0::2]
    for g, b in zip(reversed(stages), reversed(fresh), strict=True):
        n = b.shape[-1]
        a, alone = v[..., :n], v[..., n:]
        first = _joined(a * g[:, 0, 0] + b * g[:, 0, 1], alone)
        v = _interleaved(first, a * g[:, 1, 0] + b * g[:, 1, 1])
    return v


def _joined(a: Tensor, alone: Tensor) -> Tensor:
    return torch.cat([a, alone], dim=-1) if alone.shape[-1] else a


def _interleaved(a: Tensor, b: Tensor) -> Tensor:
    """a_1, b_1, a_2, b_2, ...; a may be longer by one, which is then the last."""
    n = b.shape[-1]
    return _joined(torch.stack([a[..., :n], b], dim=-1).flatten(-2), a[..., n:])
