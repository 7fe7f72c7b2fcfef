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

from isotune.linalg.thin import thin_add


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in fp32, or as it is when it is fp32 or fp64 already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit_columns(U: Tensor) -> Tensor:
    """Scale every column of U (d x r) to length one; a zero column stays zero and its gradient stays finite."""
    return U / _column_norms(U)


def _column_norms(U: Tensor) -> Tensor:
    """The length of every column, 1 for a zero column; shape (r)."""
    # Dividing by the largest entry first keeps the squares of very small or large columns in range.
    # The scale is a constant to autograd: the result does not depend on it.
    largest = U.detach().abs().amax(dim=0)
    largest = torch.where(largest > 0, largest, 1.0)
    norms = torch.linalg.vector_norm(U / largest, dim=0)
    return largest * torch.where(norms > 0, norms, 1.0)


def compact_wy(U: Tensor) -> tuple[Tensor, Tensor]:
    """Return (Û, M) with `H_1 ... H_r = I - Û M` for columns U (d x r) of any length; M = S⁻¹ Ûᵀ is (r x d).

    Û has unit columns. A zero column stands for no reflection: it stays zero, and so does its row of M. Computed in
    fp32 or better, whatever the autocast state, because S decides whether H is orthogonal. Differentiable twice.
    """
    with torch.autocast(device_type=U.device.type, enabled=False):
        unit, M, _ = _CompactWY.apply(at_least_fp32(U))
    return unit, M


class _CompactWY(torch.autograd.Function):
    """One node for the r x r algebra, in place of some thirty small ones forward and backward.

    The norms are an output, too, so that they can be saved and still be differentiated twice.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(U: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        norms = _column_norms(U)
        unit = U / norms
        return unit, torch.linalg.solve_triangular(_triangle(unit), unit.mT, upper=True), norms

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*output)

    @staticmethod
    def backward(ctx: Any, g_unit: Tensor, g_M: Tensor, g_norms: Tensor) -> Tensor:
        unit, M, norms = ctx.saved_tensors
        # M = S⁻¹ Ûᵀ:  dM = S⁻¹ (dÛᵀ - dS M),  S = striu(ÛᵀÛ, 1) + ½ I
        Y = torch.linalg.solve_triangular(_triangle(unit).mT, g_M, upper=False)
        g_gram = torch.triu(Y @ M.mT, diagonal=1)
        g_unit = g_unit + Y.mT - unit @ (g_gram + g_gram.mT)
        # Û = U / |U|: what remains is tangential.
        return (g_unit - unit * (unit * g_unit).sum(dim=0)) / norms + unit * g_norms


def _triangle(unit: Tensor) -> Tensor:
    """S = striu(ÛᵀÛ, 1) + ½ I for unit or zero columns."""
    half = torch.full((unit.shape[1],), 0.5, dtype=unit.dtype, device=unit.device)
    return torch.triu(unit.mT @ unit, diagonal=1) + torch.diag(half)


def rotate(v: Tensor, U: Tensor, M: Tensor, transpose: bool = False) -> Tensor:
    """Compute `v H`, or `v Hᵀ`, for rows v (..., d) and H = I - U M; the result has v's dtype."""
    left, right = (M.mT, U.mT) if transpose else (U, M)
    return thin_add(v, left.to(v.dtype), right.to(v.dtype), scale=-1.0)


def orthonormal_basis(V: Tensor) -> Tensor:
    """Orthonormalise the columns of V (d x r, r <= d) in order, as Gram-Schmidt does, up to signs, by QR.

    A column that depends on those before it becomes zero. The gradient is finite in that case too.
    """
    with torch.autocast(device_type=V.device.type, enabled=False):
        V = unit_columns(at_least_fp32(V))
        with torch.no_grad():
            Q, R = torch.linalg.qr(V)
            independent = R.diagonal().abs() > 32 * torch.finfo(V.dtype).eps
        # QR's gradient divides by R's diagonal: dependent columns are replaced before the differentiated pass.
        Q, _ = torch.linalg.qr(torch.where(independent, V, Q))
        return Q * independent


def orthogonality_penalty(U: Tensor, squared: bool = True) -> Tensor:
    """`|I - ÛᵀÛ|_F²` (or un-squared) over the normalised columns of U (d x r): 0 iff they are orthonormal."""
    with torch.autocast(device_type=U.device.type, enabled=False):
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
