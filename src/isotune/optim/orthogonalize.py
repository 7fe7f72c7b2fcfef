"""The nearest (semi-)orthogonal matrix, by a few matrix products or exactly: what Muon and its kin do to a momentum.

    G = U S Vᵀ  →  U Vᵀ,   by   X ← (a I + b X Xᵀ + c (X Xᵀ)²) X   from   X = G / |G|_F      (rows ≤ columns)

which lifts every singular value towards 1. Newton-Schulz's five steps bring those above 0.003 |G|_F into
[0.68, 1.20], Polar Express's those above 0.001 |G|_F into [0.85, 1.14]; "svd" is exact, and zero where G has no rank.

Where a matrix is at least twice as wide as high (LoRA's factors are a hundred times), the steps are taken on its Gram
matrix, and the two large products are all that is left of ten. Cost, for p x q: 4 p² q + O(p³) flops, else five times
that.

Sources: Jordan et al., "Muon", 2024; Amsel et al., "The Polar Express", 2025, arXiv 2505.16932.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Method = Literal["newton-schulz", "polar-express", "svd"]
Polynomial = tuple[float, float, float]

NEWTON_SCHULZ: Polynomial = (3.4445, -4.7750, 2.0315)
POLAR_EXPRESS: tuple[Polynomial, ...] = (
    (8.15655, -22.48329, 15.87877),
    (4.04293, -2.80892, 0.50002),
    (3.89167, -2.77248, 0.50606),
    (3.28565, -2.36813, 0.46449),
    (2.34654, -1.70978, 0.42324),
)
"""The best polynomials for five steps from [0.001, 1], a, b and c each; the last for all steps after."""

_LEAST = 1e-17
"""A norm whose square fp32 still has; what is shorter stays so."""


def orthogonalize(
    G: Tensor,
    method: Method = "newton-schulz",
    steps: int = 5,
    dtype: torch.dtype | None = None,
    coefficients: Polynomial | None = None,
) -> Tensor:
    """The matrices (..., m, n) nearest to G (..., m, n) with all singular values 1, roughly, in G's dtype.

    Zero stays zero, and nothing depends on G's length (above 1e-17).

    Args:
        G: One matrix or many, which are treated at once.
        method: How; see above.
        steps: Of the two iterations.
        dtype: To iterate in: by default G's, or fp32 if that is larger. bf16 costs one or two per cent of accuracy.
        coefficients: a, b and c of every step, in place of the method's.

    Raises:
        ValueError: An unknown method, fewer dimensions than two.
    """
    if G.dim() < 2:
        raise ValueError(f"a matrix has two dimensions, and this has {G.dim()}")
    if method not in get_args(Method):
        raise ValueError(f"method is {method!r}; it is one of {', '.join(get_args(Method))}")
    exact = torch.promote_types(G.dtype, torch.float32)
    if method == "svd":
        return _exact(G.to(dtype or exact)).to(G.dtype)
    tall = G.shape[-2] > G.shape[-1]
    X = G.reshape(-1, *G.shape[-2:]).to(exact)
    polynomials = list(_polynomials(method, steps, coefficients))
    margin = 1.02 if method == "polar-express" else 1.0
    whole = (dtype or exact) in (torch.float32, torch.float64)
    if whole and max(X.shape[-2:]) >= 2 * min(X.shape[-2:]):
        X = _by_gram(X.to(dtype or exact), polynomials, margin)
    else:
        norm = margin * torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True).clamp_min(_LEAST)
        X = (X / norm).to(dtype or exact)
        X = _by_products(X.mT, polynomials).mT if tall else _by_products(X, polynomials)
    return X.reshape(G.shape).to(G.dtype)


def _polynomials(method: Method, steps: int, coefficients: Polynomial | None) -> Iterator[Polynomial]:
    for step in range(steps):
        if coefficients is not None:
            yield coefficients
        elif method == "newton-schulz":
            yield NEWTON_SCHULZ
        else:
            yield POLAR_EXPRESS[min(step, len(POLAR_EXPRESS) - 1)]


def _by_products(X: Tensor, polynomials: Sequence[Polynomial]) -> Tensor:
    for a, b, c in polynomials:
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X


def _by_gram(X: Tensor, polynomials: Sequence[Polynomial], margin: float) -> Tensor:
    """The same, with the product of all steps' polynomials in the Gram matrix, with which they all commute."""
    tall = X.shape[-2] > X.shape[-1]
    S = X.mT @ X if tall else X @ X.mT
    scale = S.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(_LEAST**2)[:, None, None].rsqrt() / margin
    S, product = S * scale**2, torch.eye(S.shape[-1], dtype=X.dtype, device=X.device).expand_as(S)
    for a, b, c in polynomials:
        P = torch.baddbmm(S, S, S, beta=b, alpha=c)
        P.diagonal(dim1=-2, dim2=-1).add_(a)
        product = P @ product
        S = P @ S @ P
    return X @ (product * scale) if tall else (product * scale) @ X


def _exact(X: Tensor) -> Tensor:
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    rank = max(X.shape[-2:]) * torch.finfo(S.dtype).eps * S[..., :1] < S
    return (U * rank[..., None, :]) @ Vh
