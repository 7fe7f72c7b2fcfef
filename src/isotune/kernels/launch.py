"""Compact WY on a GPU: which kernels are launched, over what, for columns U (d, r) of fp32, bf16 or fp16."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from isotune.kernels import wy, wy_tiled
from isotune.kernels.choice import padded

SMALL = 32
"""Up to so many, one block of rows inverts S on the side."""
ROWS = 64
TILE = 32
PARTS, TILED_PARTS = 64, 16
"""The most parts that sums over d are made in: every block of rows reads all of them."""


class WY(NamedTuple):
    """What the forward kernels make."""

    unit: Tensor
    """Û (d, r), in the dtype asked for."""
    MT: Tensor
    """Mᵀ (d, r), likewise."""
    T: Tensor
    """S⁻¹ (R, R) in fp32, with R = r padded; so is what follows."""
    gram: Tensor
    """ÛᵀÛ (R, R)."""
    scale: Tensor
    """(2, R): the largest entry of each column, and that over its length."""


def forward(U: Tensor, dtype: torch.dtype) -> WY:
    """Û and Mᵀ in this dtype, and what backward needs."""
    d, r = U.shape
    R, n, steps = _sizes(d, r)
    unit, MT = (U.new_empty(d, r, dtype=dtype) for _ in range(2))
    made = WY(unit, MT, _fp32(U, R, R), _fp32(U, R, R), _fp32(U, 2, R))
    parts, tops = _fp32(U, n, R, R), _fp32(U, n, R)
    tiles, blocks = R // TILE, triton.cdiv(d, ROWS)
    with torch.cuda.device_of(U):
        if R <= SMALL:
            wy.gram[(n,)](U, parts, tops, d, r, STEPS=steps, R=R, BD=ROWS)
            wy.forward[(blocks,)](U, parts, tops, *made, d, r, n=n, R=R, LEVELS=_log2(R), BD=ROWS, num_warps=R // 4)
            return made
        sizes = {"R": R, "T": TILE}
        wy_tiled.gram_tiles[(n, tiles, tiles)](U, parts, tops, d, r, STEPS=steps, BD=ROWS, **sizes)
        into = (made.gram, made.scale, made.T)
        wy_tiled.sum_and_invert[(tiles, tiles)](parts, tops, *into, n=n, LEVELS=_log2(TILE), **sizes)
        for level in range(_log2(tiles)):
            half = 2**level
            wy_tiled.join[(half, half, tiles // (2 * half))](made.gram, made.T, HALF=half, **sizes)
        wy_tiled.forward_tiles[(blocks, tiles)](U, made.T, made.scale, made.unit, made.MT, d, r, BD=ROWS, **sizes)
    return made


def backward(U: Tensor, T: Tensor, gram: Tensor, scale: Tensor, g_unit: Tensor, g_MT: Tensor) -> Tensor:
    """The gradient of U, in its dtype, from those of Û and Mᵀ (d, r), and what `forward` made."""
    d, r = U.shape
    R, n, steps = _sizes(d, r)
    grads = g_unit.contiguous(), g_MT.contiguous()
    parts, diagonals, out = _fp32(U, n, R, R), _fp32(U, n, R), torch.empty_like(U)
    tiles, blocks = R // TILE, triton.cdiv(d, ROWS)
    with torch.cuda.device_of(U):
        if R <= SMALL:
            wy.sums[(n,)](U, scale, *grads, parts, diagonals, d, r, STEPS=steps, R=R, BD=ROWS)
            wy.backward[(blocks,)](
                U, T, gram, scale, *grads, parts, diagonals, out, d, r, n=n, R=R, BD=ROWS, num_warps=R // 4
            )
            return out
        sizes = {"R": R, "T": TILE}
        A, S = _fp32(U, R, R), _fp32(U, R, R)
        wy_tiled.sums_tiles[(n, tiles, tiles)](
            U, scale, *grads, parts, diagonals, d, r, STEPS=steps, BD=ROWS, **sizes
        )
        wy_tiled.left[(tiles, tiles)](T, parts, A, n=n, **sizes)
        wy_tiled.symmetric[(tiles, tiles)](T, A, S, **sizes)
        wy_tiled.backward_tiles[(blocks, tiles)](
            U, T, gram, scale, *grads, A, S, diagonals, out, d, r, n=n, BD=ROWS, **sizes
        )
    return out


def _sizes(d: int, r: int) -> tuple[int, int, int]:
    """R, the number n of parts that sums over d are made in, and the blocks of rows in a part."""
    R, blocks = padded(r), triton.cdiv(d, ROWS)
    steps = triton.cdiv(blocks, PARTS if R <= SMALL else TILED_PARTS)
    return R, triton.cdiv(blocks, steps), steps


def _fp32(U: Tensor, *size: int) -> Tensor:
    return U.new_empty(size, dtype=torch.float32)


def _log2(n: int) -> int:
    return n.bit_length() - 1
