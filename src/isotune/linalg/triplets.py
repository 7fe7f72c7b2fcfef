"""Thin parts of a matrix W (m x n) by decomposition: r of its singular triplets, or of the columns of its QR.

    W = U diag(S) Vᵀ,   U (m x k), V (n x k) orthonormal, S descending, k = min(m, n)
    W = Q R,            Q (m x k) orthonormal, R (k x n) upper triangular

Everything is computed in fp32 or better, whatever the autocast state, and is a constant to autograd. Decompositions
leave signs open; here they are fixed, so that one matrix gives one answer on every machine, but in
`principal_directions`.

Sources: Halko, Martinsson and Tropp, "Finding structure with randomness" (2011), algorithm 4.4, for the randomised
one; CorDA (arXiv 2406.05223) for the one that sees W through a covariance.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from isotune.linalg.precision import at_least_fp32
from isotune.linalg.thin import without_autocast

Triplets = tuple[Tensor, Tensor, Tensor]
"""U (m, r), S (r) and Vᵀ (r, n)."""
Fuse = Literal["UV", "U", "V"]

_OVERSAMPLING = 8


@torch.no_grad()
def singular_triplets(W: Tensor, r: int, smallest: bool = False) -> Triplets:
    """The r triplets of W (m, n) with the largest (or smallest) singular values."""
    with without_autocast(W):
        U, S, Vh = torch.linalg.svd(at_least_fp32(W), full_matrices=False)
        return _chosen(U, S, Vh, r, smallest)


def principal_directions(
    W: Tensor, r: int, iterations: int | None = None, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, r), S (r) and Vᵀ (r, in) of the r largest singular values of W (out, in), in fp32 or better.

    With `iterations` by so many power iterations of a randomised SVD, always in fp32 and repeatable by its seed;
    torch's own generator is left as it was. The signs of the directions are those that come.
    """
    if iterations is None:
        U, S, Vh = torch.linalg.svd(at_least_fp32(W), full_matrices=False)
    else:
        with torch.random.fork_rng([W.device] if W.is_cuda else []):
            torch.manual_seed(seed)
            U, S, V = torch.svd_lowrank(W.float(), q=r, niter=iterations)
            Vh = V.mT
    return U[:, :r], S[:r], Vh[:r]


@torch.no_grad()
def random_triplets(W: Tensor, r: int, niter: int, generator: torch.Generator) -> Triplets:
    """About the r largest triplets of W (m, n), in O(m n r) per pass: a random subspace and `niter` power iterations.

    The error falls as `(S[r + 8] / S[r]) ** (2 niter + 1)`: eight more columns than asked for are iterated.
    """
    with without_autocast(W):
        W = at_least_fp32(W)
        columns = min(r + _OVERSAMPLING, *W.shape)
        start = torch.randn(W.shape[1], columns, generator=generator, dtype=W.dtype).to(W.device)
        Q = torch.linalg.qr(W @ start)[0]
        for _ in range(niter):
            Q = torch.linalg.qr(W @ torch.linalg.qr(W.mT @ Q)[0])[0]
        U, S, Vh = torch.linalg.svd(Q.mT @ W, full_matrices=False)
        return _chosen(Q @ U, S, Vh, r)


@torch.no_grad()
def context_triplets(
    W: Tensor, C: Tensor, r: int, smallest: bool = False, damping: float = 0.01
) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, r), S (r) and V̂ᵀ (r, n) of `W = U diag(S) V̂ᵀ`, from the SVD of W C': `V̂ᵀ = Vᵀ C'⁻¹`.

    C (n x n) is the covariance of the inputs, symmetric and not zero; `C' = C / c + damping I`, with c the mean of
    its diagonal, so that the scale of C does not matter. The damping is doubled until the inverse is one.
    """
    with without_autocast(W):
        W = at_least_fp32(W)
        C = C.to(W)
        C = C / C.diagonal().mean()
        eye = torch.eye(C.shape[0], dtype=C.dtype, device=C.device)
        while True:
            damped = C + damping * eye
            inverse, failed = torch.linalg.inv_ex(damped)
            if not failed and torch.dist(damped @ inverse, eye) < 0.05:
                break
            damping *= 2
        U, S, Vh = torch.linalg.svd(W @ damped, full_matrices=False)
        U, S, Vh = _chosen(U, S, Vh, r, smallest)
        return U, S, Vh @ inverse


@torch.no_grad()
def leading_qr(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The first r columns of Q (m, r) and rows of R (r, n), with the diagonal of R not negative."""
    with without_autocast(W):
        Q, R = torch.linalg.qr(at_least_fp32(W))
        signs = torch.where(R.diagonal() < 0, -1.0, 1.0).to(R.dtype)[:r]
        return Q[:, :r] * signs, R[:r] * signs[:, None]


def fused(U: Tensor, S: Tensor, Vh: Tensor, fuse: Fuse = "UV") -> tuple[Tensor, Tensor]:
    """B (m, r) and A (r, n) with `B A = U diag(S) Vᵀ`: S goes half to each (UV), or all to B (U) or to A (V)."""
    if fuse == "UV":
        root = S.sqrt()
        return U * root, root[:, None] * Vh
    return (U * S, Vh) if fuse == "U" else (U, S[:, None] * Vh)


def row_signs(A: Tensor) -> Tensor:
    """For each row of A (r, in) the sign of its largest entry (r), 1 or -1: the same in any precision."""
    largest = A.gather(1, A.abs().argmax(dim=1, keepdim=True)).flatten()
    return torch.where(largest < 0, -1.0, 1.0).to(A.dtype)


def orthonormality_error(V: Tensor, squared: bool = False) -> Tensor:
    """`|I - VᵀV|_F` (or its square) for columns V (d x r) as they are: 0 where they are orthonormal."""
    with without_autocast(V):
        V = at_least_fp32(V)
        error = V.mT @ V - torch.eye(V.shape[1], dtype=V.dtype, device=V.device)
        return error.square().sum() if squared else torch.linalg.vector_norm(error)


def _chosen(U: Tensor, S: Tensor, Vh: Tensor, r: int, smallest: bool = False) -> Triplets:
    """The first (or last) r triplets, the entry of largest magnitude in each column of U made positive."""
    keep = slice(-r, None) if smallest else slice(r)
    U, S, Vh = U[:, keep], S[keep], Vh[keep]
    signs = row_signs(U.mT)
    return U * signs, S, signs[:, None] * Vh
