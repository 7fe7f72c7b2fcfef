"""Products of Householder reflections, applied in O(d r) per row and never formed as a d x d matrix.

    H = H_1 H_2 ... H_r,   H_i = I - 2 u_i u_iᵀ / |u_i|²            (d x d, orthogonal, det (-1)^r)
      = I - U S⁻¹ Uᵀ,      S = striu(UᵀU, 1) + ½ diag(UᵀU)           (compact WY form, exact)

Source: Joffrain, Low, Quintana-Ortí, van de Geijn and Van Zee, "Accumulating Householder transformations,
revisited" (2006). Letters: d the dimension rotated, r the number of reflections, n rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isotune.linalg.autograd import Node
from isotune.linalg.precision import at_least_fp32
from isotune.linalg.thin import thin_add, without_autocast


def unit_columns(U: Tensor) -> Tensor:
    """Scale every column of U (d x r) to length one; a zero column stays zero and its gradient stays finite."""
    return U / _column_norms(U)


def _column_norms(U: Tensor) -> Tensor:
    """The length of every column (r); for a zero column a positive number."""
    # In fp32 the squares of what is below 1e-22 or above 1e19 would be 0 or infinite. Apple's GPUs have no fp64.
    wide = U.dtype if U.device.type == "mps" else torch.float64
    norms = torch.linalg.vector_norm(U, dim=0, dtype=wide)
    return norms.to(U.dtype).clamp_min(torch.finfo(U.dtype).tiny)


def mean_length(U: Tensor) -> float:
    """The root mean square length of the columns of U (d, r) that are not zero; 1 where there are none."""
    if U.is_meta:
        return 1.0
    norms = torch.linalg.vector_norm(U.detach().double(), dim=0)
    return float(norms[norms > 0].square().mean().sqrt()) if norms.any() else 1.0


def compact_wy(U: Tensor) -> tuple[Tensor, Tensor]:
    """Return (Û, M) with `H_1 ... H_r = I - Û M` for columns U (d x r) of any length; M = S⁻¹ Ûᵀ is (r x d).

    Û has unit columns. A zero column stands for no reflection: it stays zero, and so does its row of M. Computed in
    fp32 or better, whatever the autocast state, because S decides whether H is orthogonal. Differentiable twice.
    """
    with without_autocast(U):
        unit, M, _, _ = _CompactWY.run(at_least_fp32(U))
    return unit, M


class _CompactWY(Node):
    """One node for the r x r algebra, in place of some thirty small ones forward and backward.

    The norms and T = S⁻¹ are outputs, too, so that they can be saved and still be differentiated twice.
    """

    @staticmethod
    def forward(U: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        norms = _column_norms(U)
        unit = U / norms
        # T = S⁻¹, by way of 2 S, which has ones on its diagonal; the solver never reads the other triangle.
        two = 2 * torch.eye(U.shape[1], dtype=U.dtype, device=U.device)
        T = torch.linalg.solve_triangular(2 * (unit.mT @ unit), two, upper=True, unitriangular=True)
        return unit, T @ unit.mT, norms, T

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, g_unit: Tensor | None, g_M: Tensor | None, g_norms: Tensor | None, g_T: Tensor | None
    ) -> Tensor:
        unit, M, norms, T = ctx.saved_tensors
        g = torch.zeros_like(unit) if g_unit is None else g_unit
        g_M = torch.zeros_like(M) if g_M is None else g_M
        # M = T Ûᵀ:  dM = T (dÛᵀ - dS M),  dT = -T dS T,  S = striu(ÛᵀÛ, 1) + ½ I
        Y = T.mT @ g_M
        g_S = Y @ M.mT if g_T is None else Y @ M.mT + T.mT @ g_T @ T.mT
        g_S = torch.triu(g_S, diagonal=1)
        g = torch.addmm(g + Y.mT, unit, g_S + g_S.mT, alpha=-1)
        # Û = U / |U|: what remains is tangential.
        g = torch.addcmul(g, unit, (unit * g).sum(dim=0), value=-1) / norms
        return g if g_norms is None else torch.addcmul(g, unit, g_norms)


def neumann_wy(U: Tensor) -> tuple[Tensor, Tensor]:
    """Return (Û, M) as `compact_wy` does, with S⁻¹ cut off after two terms of its Neumann series.

    For S = D + A, D diagonal and A strictly upper triangular, M = (D⁻¹ - D⁻¹ A D⁻¹) Ûᵀ. It is exact for up to two
    columns; for more, I - Û M is not orthogonal, and equal pairs of columns no longer cancel.
    """
    with without_autocast(U):
        unit = unit_columns(at_least_fp32(U))
        two = 2 * torch.eye(U.shape[1], dtype=unit.dtype, device=U.device)
        M = (two - 4 * torch.triu(unit.mT @ unit, diagonal=1)) @ unit.mT
    return unit, M


def block_columns(u: Tensor) -> Tensor:
    """Vectors u (k x d/k) of k blocks as the columns of a matrix (d x k), each zero outside its own block."""
    k, _ = u.shape
    return (u[:, :, None] * torch.eye(k, dtype=u.dtype, device=u.device)[:, None, :]).reshape(-1, k)


def rotate(v: Tensor, U: Tensor, M: Tensor, transpose: bool = False) -> Tensor:
    """Compute `v H`, or `v Hᵀ`, for rows v (..., d) and H = I - U M; the result has v's dtype."""
    left, right = (M.mT, U.mT) if transpose else (U, M)
    return thin_add(v, left.to(v.dtype), right.to(v.dtype), scale=-1.0)


def orthonormal_basis(V: Tensor) -> Tensor:
    """Orthonormalise the columns of V (d x r, r <= d) in order, as Gram-Schmidt does, up to signs, by QR.

    A column that depends on those before it becomes zero. The gradient is finite in that case too.
    """
    with without_autocast(V):
        V = unit_columns(at_least_fp32(V))
        with torch.no_grad():
            Q, R = torch.linalg.qr(V)
            independent = R.diagonal().abs() > 32 * torch.finfo(V.dtype).eps
        # QR's gradient divides by R's diagonal: dependent columns are replaced before the differentiated pass.
        Q, _ = torch.linalg.qr(torch.where(independent, V, Q))
        return Q * independent


def orthogonality_penalty(U: Tensor, squared: bool = True) -> Tensor:
    """`|I - ÛᵀÛ|_F²` (or un-squared) over the normalised columns of U (d x r): 0 iff they are orthonormal."""
    with without_autocast(U):
        U = unit_columns(at_least_fp32(U))
        error = torch.eye(U.shape[1], dtype=U.dtype, device=U.device) - U.mT @ U
        return error.square().sum() if squared else torch.linalg.vector_norm(error)


def dense_reflections(U: Tensor) -> Tensor:
    """Form `H_1 H_2 ... H_r` (d x d), one reflection after another: the oracle that tests compare with."""
    H = torch.eye(U.shape[0], dtype=U.dtype, device=U.device)
    for u in U.unbind(dim=1):
        if u.any():
            u = u / u.norm()
            H = H - 2 * torch.outer(H @ u, u)
    return H
