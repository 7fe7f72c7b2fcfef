"""Calculus on the orthogonal group: logarithms, powers, means, and products of reflections.

    log R = V diag(θ / sin θ) Vᵀ (R - Rᵀ) / 2,   (R + Rᵀ) / 2 = V diag(cos θ) Vᵀ, or where an angle is above 90
            degrees, for precision, I + R = … diag(2 cos(θ / 2)) Vᵀ   (SVD)
    R^w = exp(w log R)
    M = argmin Σ w_i |log(MᵀR_i)|²,   found by  M ← M exp(Σ w_i log(MᵀR_i)),   where Σ w_i log(MᵀR_i) = 0
    R = H_1 H_2 ... H_s,   s = rank(R - I)   (Scherk; no fewer reflections give R)

log is the principal one, skew-symmetric with angles θ below π; a rotation with the eigenvalue -1 has none. With δ the
distance of the largest angle from π its error is of the order of eps / δ, as the problem's own is, and near the
identity it is relative to R - I. All but `reflections` work on batches. Cost: O(k³) for each k x k matrix and step.

Sources: Higham, "Functions of Matrices" (2008), chapters 6 and 8; Manton, "A globally convergent numerical algorithm
for computing the centre of mass on compact Lie groups" (2004); Scherk, "On the decomposition of orthogonalities into
symmetries" (1950).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from isotune.linalg.factorised import det


def nearest_orthogonal(X: Tensor) -> Tensor:
    """The orthogonal matrices nearest to X (..., k, k): the polar factors. They are unique where X is invertible."""
    eye = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    gram = X.mT @ X
    off = torch.linalg.matrix_norm(gram - eye)
    if off.numel() and float(off.max()) < torch.finfo(X.dtype).eps ** 0.5:
        # X (XᵀX)^(-1/2) to the first order in XᵀX - I, whose square is no more than rounding.
        return X @ (1.5 * eye - 0.5 * gram)
    U, _, Vh = torch.linalg.svd(X)
    return U @ Vh


def _nearest_with_determinant(X: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest orthogonal matrices with determinants of this sign (...), and how unique they are (...).

    The second is zero where there are several, else positive (Kabsch 1976; Umeyama 1991).
    """
    U, S, Vh = torch.linalg.svd(X)
    last = torch.sign(det(U @ Vh) * sign)
    U = torch.cat([U[..., :-1], U[..., -1:] * last[..., None, None]], dim=-1)
    return U @ Vh, S[..., -2] + last * S[..., -1] if S.shape[-1] > 1 else torch.ones_like(last)


def log_orthogonal(R: Tensor) -> Tensor:
    """The principal logarithms of orthogonal R (..., k, k): skew-symmetric, all angles below π.

    Raises ValueError where R has the eigenvalue -1 to within the root of the dtype's precision, so that its logarithm
    is not unique, or, for a determinant of -1, does not exist.
    """
    # Where no angle is above 90 degrees, the cosines are precise enough and their eigenvectors half the work.
    cosines, V = torch.linalg.eigh((R + R.mT) / 2)
    if cosines.numel() and float(cosines.min()) > 0:
        cosines = cosines.clamp(max=1.0)
        sin = (1 - cosines).mul(1 + cosines).sqrt()
        factor = _over(torch.atan2(sin, cosines), sin)
    else:
        eye = torch.eye(R.shape[-1], dtype=R.dtype, device=R.device)
        _, S, Vh = torch.linalg.svd(eye + R)
        half = (S / 2).clamp(max=1.0)  # cosines of θ / 2
        if half.numel() and float(half.min()) < torch.finfo(R.dtype).eps ** 0.5:
            raise ValueError("it has the eigenvalue -1 (it turns something by 180 degrees, or reflects it)")
        sin, V = (1 - half).mul(1 + half).sqrt(), Vh.mT
        factor = _over(torch.atan2(sin, half), sin) / half
    log = V @ (factor[..., None] * V.mT) @ (R - R.mT) / 2
    return (log - log.mT) / 2


def _over(angle: Tensor, sine: Tensor) -> Tensor:
    """An angle over its sine, which tends to 1; by atan2, since acos alone would lose half of the digits."""
    return torch.where(sine > 0, angle / sine.clamp_min(torch.finfo(sine.dtype).tiny), 1.0)


def power(R: Tensor, w: float) -> Tensor:
    """`R^w` for orthogonal R (..., k, k): along the shortest way from the identity where w is no whole number.

    Raises ValueError where that needs a logarithm which R has not.
    """
    if w == int(w):
        return torch.linalg.matrix_power(R if w >= 0 else R.mT, abs(int(w)))
    return torch.linalg.matrix_exp(w * log_orthogonal(R))


def mean(rotations: Sequence[Tensor], weights: Sequence[float], steps: int = 500) -> Tensor:
    """The Karcher mean of orthogonal matrices (..., k, k), whose weights are positive and sum to 1.

    It starts at the orthogonal matrix nearest to the weighted sum, so that the order does not matter. It is the one
    minimum where all R_i lie within π/2 of it (in the largest angle), and else may be a local one.

    Raises ValueError where determinants differ in sign, where the start or a logarithm is not unique, or where it has
    not converged after so many steps.
    """
    R = torch.stack(tuple(torch.broadcast_tensors(*rotations)))
    w = torch.tensor(weights, dtype=R.dtype, device=R.device).view(-1, *[1] * (R.dim() - 1))
    determinants = det(R)
    if bool((determinants * determinants[0] < 0).any()):
        raise ValueError(
            "some of them have the determinant 1 and some -1 (an even and an odd number of reflections), and no path "
            "of orthogonal matrices joins these"
        )
    M, unique = _nearest_with_determinant((w * R).sum(dim=0), determinants[0])
    too_far = "they lie too far apart for one mean: "
    if float(unique.min()) < torch.finfo(R.dtype).eps ** 0.5:
        raise ValueError(f"{too_far}there is no one orthogonal matrix nearest to their weighted sum")
    tolerance = 1e3 * torch.finfo(R.dtype).eps
    for _ in range(steps):
        try:
            step = (w * log_orthogonal(M.mT @ R)).sum(dim=0)
        except ValueError:
            raise ValueError(f"{too_far}seen from their mean, one turns something by 180 degrees") from None
        M = M @ torch.linalg.matrix_exp(step)
        if torch.linalg.vector_norm(step, dim=(-2, -1)).max() <= tolerance * max(R.shape[-1], 1):
            return nearest_orthogonal(M)
    raise ValueError(f"{too_far}no convergence in {steps} steps")


def reflections(R: Tensor) -> Tensor:
    """Unit columns U (k x s) with `H_1 ... H_s = R`, for orthogonal R (k x k): s = rank(R - I), the least possible.

    Householder QR of R inside the space that R moves.
    """
    eye = torch.eye(len(R), dtype=R.dtype, device=R.device)
    V, S, _ = torch.linalg.svd(R - eye)
    V = V[:, 32 * len(R) * torch.finfo(R.dtype).eps < S]
    rest = V.mT @ R @ V
    columns = []
    # One after the other: each reflection depends on what those before it left. The whole is small.
    for j in range(len(rest)):
        u = rest[:, j].clone()
        u[:j] = 0
        # u = R e_j - e_j; the column has length one, which gives R_jj - 1 without cancellation.
        u[j] = u[j] - 1 if u[j] <= 0 else -u[j + 1 :].square().sum() / (1 + u[j])
        u = u / torch.linalg.vector_norm(u).clamp_min(torch.finfo(R.dtype).tiny)
        rest = torch.addr(rest, u, u @ rest, alpha=-2)
        columns.append(u)
    return V @ torch.stack(columns, dim=1) if columns else V
