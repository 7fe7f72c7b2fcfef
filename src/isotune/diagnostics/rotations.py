"""How orthogonal an adapter's rotations are, and by which angles they turn, without a d x d matrix.

An orthogonal R splits the space into planes that it turns by an angle, directions that it reflects (π), and the rest,
which it leaves alone. The angles are those of R's eigenvalues `exp(±iθ)`, found from what R is made of:

    R = I - U M, U (d x r)        the r x r core `I - (QᵀU)(M Q)`, with Q an orthonormal basis of U's columns
    R of diagonal blocks b x b    each block's own

The core is orthogonal when R is, so its eigenvalues are as exact as its entries; those of `M U`, the other way to the
same angles, lose half the digits where reflections cancel in pairs.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from isotune.adapters.block_rotation import BlockRotation
from isotune.adapters.contract import Adapter, Rotation
from isotune.adapters.thin_rotation import ThinRotation

_PROBES = 64
_WIDEST = 512  # blocks wider than this would be a d x d matrix in all but name
_ORTHOGONAL = 1e-3
_ZERO = 1e-6


def rotations(adapter: Adapter) -> list[Rotation]:
    """The rotations that an adapter is made of: itself, its inner and outer one, or none."""
    return [module for module in adapter.modules() if isinstance(module, Rotation)]


@torch.no_grad()
def orthogonality_error(adapter: Adapter, shape: tuple[int, int]) -> float | None:
    """`|v R Rᵀ - v| / |v|` over random rows v, the largest of the adapter's rotations; None where it has none.

    `shape` is (out, in), that of the weight.
    """
    errors = [_error(rotation, shape[1] if rotation.side == "in" else shape[0]) for rotation in rotations(adapter)]
    return max(errors, default=None)


def _error(rotation: Rotation, d: int) -> float:
    v = torch.randn(_PROBES, d, generator=torch.Generator().manual_seed(0))
    back = rotation.rotate(rotation.rotate(v), transpose=True)
    return float((back - v).norm() / v.norm())


@torch.no_grad()
def rotation_angles(adapter: Adapter, shape: tuple[int, int]) -> Tensor | None:
    """The angles by which the adapter rotates a weight of that shape (out, in), in radians, descending, not zero.

    One in (0, π) for each plane that is turned and π for a direction that is reflected (a plane turned by π counts
    once); of two-sided rotations those of both sides. None for what is no rotation, is not orthogonal, or has no
    cheap exact form, such as a long product of Givens rotations.
    """
    error = orthogonality_error(adapter, shape)
    if error is None or error > _ORTHOGONAL:
        return None
    found = []
    for rotation in rotations(copy.deepcopy(adapter).double()):
        eigenvalues = _eigenvalues(rotation, shape[1] if rotation.side == "in" else shape[0])
        if eigenvalues is None:
            return None
        found.append(_angles(eigenvalues))
    return torch.cat(found).sort(descending=True).values


def core(U: Tensor, M: Tensor) -> Tensor:
    """`I - U M` restricted to the span of U's columns (r x r), for U (d, r) and M (r, d)."""
    Q, R = torch.linalg.qr(U)
    return torch.eye(Q.shape[1], dtype=U.dtype, device=U.device) - R @ (M @ Q)


def _eigenvalues(rotation: Rotation, d: int) -> Tensor | None:
    """Those that can differ from one, complex."""
    if isinstance(rotation, ThinRotation):
        return torch.linalg.eigvals(core(*rotation.thin()))
    width = _block_width(rotation)
    if width is None or width > _WIDEST:
        return None
    rows = torch.eye(width, dtype=torch.float64).repeat(1, d // width)
    blocks = rotation.rotate(rows).view(width, -1, width).transpose(0, 1)
    return torch.linalg.eigvals(blocks).flatten()


def _block_width(rotation: nn.Module) -> int | None:
    """The size of the diagonal blocks that the rotation as a whole has."""
    if not isinstance(rotation, BlockRotation):
        return None
    blocks = rotation.blocks()
    # m factors of a butterfly join blocks of b into ones of b 2^(m-1).
    return blocks.shape[-1] * (2 ** (len(blocks) - 1) if blocks.dim() == 4 else 1)


def _angles(eigenvalues: Tensor) -> Tensor:
    angles = eigenvalues.angle().abs().sort(descending=True).values
    # Conjugate pairs lie side by side.
    angles = angles[::2]
    return angles[angles > _ZERO].clamp(max=math.pi)
