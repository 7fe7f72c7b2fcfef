"""The largest singular directions of a matrix, exactly or by a randomised decomposition with a seed of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from isotune.linalg.precision import at_least_fp32


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


def row_signs(A: Tensor) -> Tensor:
    """For each row of A (r, in) the sign of its largest entry (r), 1 or -1: the same in any precision."""
    largest = A.gather(1, A.abs().argmax(dim=1, keepdim=True)).flatten()
    return torch.where(largest < 0, -1.0, 1.0).to(A.dtype)
