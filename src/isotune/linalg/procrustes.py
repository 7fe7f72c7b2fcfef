"""The orthogonal matrix, and the scale, that bring one matrix closest to another, from their cross products alone."""

from __future__ import annotations

import torch
from torch import Tensor

LIMIT = 1024.0
"""No scale is larger than this or smaller than its inverse, so that what it scales can be scaled back."""


def polar(C: Tensor) -> Tensor:
    """The orthogonal (complex: unitary) R with the largest `<R, C>`, for C (..., d, d): the polar factor `U Vᴴ`.

    It minimises `|R X - Y|` for `C = Y Xᴴ` (Schönemann, "A generalized solution of the orthogonal Procrustes
    problem", Psychometrika 31, 1966).
    """
    U, _, Vh = torch.linalg.svd(C)
    return U @ Vh


def misfit(s: Tensor, a: Tensor, b: Tensor, e: Tensor, f: Tensor) -> Tensor:
    """`a s² - 2 b s + e / s² - 2 f / s`: the part of `|s X - Y|² + |P / s - Q|²` that depends on s.

    Here `a = |X|²`, `b = <X, Y>`, `e = |P|²` and `f = <P, Q>`, all of one shape.
    """
    return s * (a * s - 2 * b) + (e / s - 2 * f) / s


def best_scale(a: Tensor, b: Tensor, e: Tensor, f: Tensor, signed: bool = False) -> Tensor:
    """The s with the smallest `misfit`, for each entry of a, b, e and f (k, float64): positive, or of either sign.

    It is a root of `a s⁴ - b s³ + f s - e`, found as an eigenvalue of the companion matrix of the polynomial in t,
    `s = (e / a)^¼ t`. Where nothing within LIMIT is better than 1 it is 1, as for a and e both 0.
    """
    one = torch.ones_like(a)
    both = (a > 0) & (e > 0)
    unit = torch.where(both, (e / a.where(both, one)) ** 0.25, one)
    companion = a.new_zeros(*a.shape, 4, 4)
    companion[..., 1, 0] = companion[..., 2, 1] = companion[..., 3, 2] = 1.0
    companion[..., 0, 3] = 1.0
    # In t: t⁴ - (b unit³ / e) t³ + (f unit / e) t - 1.
    safe = e.where(both, one)
    companion[..., 1, 3] = torch.where(both, -f * unit / safe, 0.0)
    companion[..., 3, 3] = torch.where(both, b * unit**3 / safe, 0.0)
    roots = torch.linalg.eigvals(companion).real * unit[..., None]
    # With one of the two terms alone the minimum is b / a or e / f.
    alone = torch.stack([b / a.where(a > 0, one), e / f.where(f != 0, one)], dim=-1)
    candidates = torch.cat([one[..., None], roots, alone], dim=-1)
    size = candidates.abs() if signed else candidates
    usable = (size >= 1 / LIMIT) & (size <= LIMIT)
    candidates = candidates.where(usable, one[..., None])
    values = misfit(candidates, *(x[..., None] for x in (a, b, e, f)))
    best = candidates.gather(-1, values.argmin(dim=-1, keepdim=True)).squeeze(-1)
    return torch.where(misfit(best, a, b, e, f) < misfit(one, a, b, e, f), best, one)
