"""PEFT's HRA layers with another `forward`: thin products in place of dense d x d ones. Importing this imports PEFT.

    W' = W R_1 R_2 ... (the active adapters in order),   R = I - U M,   U (d x r), M (r x d)

For reflections R is the compact WY form. With `apply_GS` PEFT takes R = I - 2 V Vᵀ, V by Gram-Schmidt.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.hra.layer import HRAConv2d, HRALinear
from torch import Tensor

from isotune.linalg.forms import cheapest
from isotune.linalg.householder import at_least_fp32, compact_wy, rotate

Thin = tuple[Tensor, Tensor]


class FastHRALinear(HRALinear):
    """PEFT's HRA on a linear layer: the rows of the input are rotated; n rows cost 4 n in r flops."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output for x (..., in), in x's dtype."""
        if _left_to_peft(self):
            return super().forward(x, *args, **kwargs)
        U, M, dtype = _rotation(self)
        W, bias = _base(self, dtype)
        # y = x (W R)ᵀ = (x Rᵀ) Wᵀ: note the transpose.
        return F.linear(rotate(x.to(dtype), U, M, transpose=True), W, bias).to(x.dtype)


class FastHRAConv2d(HRAConv2d):
    """PEFT's HRA on a convolution: two more small convolutions, or a rotated kernel where that is cheaper."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output for x (b, channels, h, w), in x's dtype."""
        if _left_to_peft(self):
            return super().forward(x, *args, **kwargs)
        U, M, dtype = _rotation(self)
        base = self.base_layer
        kernel, bias = _base(self, dtype)
        W, v = kernel.flatten(1), x.to(dtype)
        rows = x.numel() // x.shape[-3] // (base.stride[0] * base.stride[1])
        sizes = rows, W.shape[1], W.shape[0], M.shape[0]
        form = cheapest(("output", "weight"), *sizes, torch.is_grad_enabled(), x.requires_grad)

        def convolve(flat: Tensor, bias: Tensor | None) -> Tensor:
            weight = flat.to(dtype).reshape(-1, *kernel.shape[1:])
            return F.conv2d(v, weight, bias, stride=base.stride, padding=base.padding)

        if form == "weight":
            return convolve(rotate(W, U, M), bias).to(x.dtype)
        WU = (W @ U.to(dtype))[:, :, None, None]
        return (convolve(W, bias) - F.conv2d(convolve(M, None), WU)).to(x.dtype)


FAST: dict[type, type] = {HRALinear: FastHRALinear, HRAConv2d: FastHRAConv2d}


def _active(layer: Any) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.hra_u]


def _left_to_peft(layer: Any) -> bool:
    """Whether no rotation has to be computed (merged, disabled, none active), or PEFT was told not to cast."""
    return layer.disable_adapters or layer.merged or not layer.cast_input_dtype_enabled or not _active(layer)


def _base(layer: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The frozen weight and the bias in `dtype`; like PEFT, no gradient for the weight, but one for the bias."""
    base = layer.get_base_layer()
    return base.weight.detach().to(dtype), None if base.bias is None else base.bias.to(dtype)


def _rotation(layer: Any) -> tuple[Tensor, Tensor, torch.dtype]:
    """U and M of the product of the active rotations, in fp32 or better, and the dtype that PEFT computes in."""
    names = _active(layer)
    pairs = [_thin(layer.hra_u[name], layer.hra_apply_GS[name]) for name in names]
    with torch.autocast(device_type=pairs[0][0].device.type, enabled=False):
        U, M = reduce(_product, pairs)
    return U, M, layer.hra_u[names[-1]].dtype


def _thin(u: Tensor, gram_schmidt: bool) -> Thin:
    if not gram_schmidt:
        return compact_wy(u)
    V = at_least_fp32(_gram_schmidt(u))
    return V, 2 * V.mT


def _product(first: Thin, second: Thin) -> Thin:
    """`(I - U M)(I - X Y) = I - [U, X - U (M X)] [M; Y]`."""
    (U, M), (X, Y) = first, second
    return torch.cat([U, X - U @ (M @ X)], dim=1), torch.cat([M, Y], dim=0)


def _gram_schmidt(u: Tensor) -> Tensor:
    """Orthonormal columns, step by step as PEFT has it.

    By QR it would be faster, but PEFT's usual start has equal columns: what remains of the second one is rounding,
    which only the same steps reproduce.
    """
    columns: list[Tensor] = []
    for column in u.split(1, dim=1):
        for done in columns:
            column = column - (done.mT @ column) * done
        columns.append(column / column.norm())
    return torch.cat(columns, dim=1)
