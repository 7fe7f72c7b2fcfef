"""The first columns and rows of `W = P L D U`: LU with partial pivoting, the pivots taken out of U."""

from __future__ import annotations

import torch
from torch import Tensor


def leading_ldu(W: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (PL, D, U): the first r columns of P L (out, r), pivots (r) and rows of U (r, in) of W (out, in).

    fp32 or fp64; r is at most the smaller side. Partial pivoting looks at no column right of the pivot's, so that a
    decomposition of the first r columns is enough: 2 r² (out + in) flops in place of all of W's. At full rank
    `PL diag(D) U = W`.

    U's diagonal is one. A row whose pivot is zero to rounding (a rank-deficient W) is divided by its largest entry in
    the pivot's place, or left as it is where it is zero throughout: the product is the same, and nothing is infinite.
    """
    LU, pivots, _ = torch.linalg.lu_factor_ex(W[:, :r])
    L = LU.tril(-1)
    L.diagonal().fill_(1)
    order = list(range(W.shape[0]))
    for i, pivot in enumerate(pivots.tolist()):
        order[i], order[pivot - 1] = order[pivot - 1], order[i]
    index = torch.tensor(order, device=W.device)
    PL = torch.empty_like(L)
    PL[index] = L
    rest = torch.linalg.solve_triangular(L[:r], W[index[:r], r:], upper=False, unitriangular=True)
    U = torch.cat([LU[:r].triu(), rest], dim=1)
    D, largest = U.diagonal().clone(), U.abs().amax(dim=1)
    zero = D.abs() <= torch.finfo(W.dtype).eps * largest
    D[zero] = torch.where(largest > 0, largest, torch.ones_like(largest))[zero]
    return PL, D, U / D[:, None]
