"""PEFT's HRA and BOFT layers with another `forward`: no dense d x d products. Importing this imports PEFT.

    HRA     W' = W R_1 R_2 ... (the active adapters in order),   R = I - U M,   U (d x r), M (r x d)
    BOFT    W' = diag(s_1 s_2 ...) W (... R_2 R_1)ᵀ,   R a product of butterflies of small blocks

For reflections R is the compact WY form. With `apply_GS` PEFT takes R = I - 2 V Vᵀ, V by Gram-Schmidt.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.boft.layer import Conv2d as BOFTConv2d
from peft.tuners.boft.layer import Linear as BOFTLinear
from peft.tuners.hra.layer import HRAConv2d, HRALinear
from torch import Tensor, nn

from isotune.kernels.householder import compact_wy
from isotune.linalg.butterfly import rotate_butterfly
from isotune.linalg.cayley import cayley
from isotune.linalg.forms import cheapest
from isotune.linalg.householder import rotate
from isotune.linalg.precision import at_least_fp32, autocast

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


class FastBOFTLinear(BOFTLinear):
    """PEFT's BOFT on a linear layer: the rows of the input are rotated factor by factor, 2 n in b m flops."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output for x (..., in), in x's dtype."""
        if _left_to_peft(self) or _only_peft_can(self):
            return super().forward(x, *args, **kwargs)
        rows = autocast(x)
        for name in reversed(_active(self)):
            rows = rotate_butterfly(rows, _butterfly(self, name))
        y = self.base_layer(rows, *args, **kwargs)
        s, bias = _scale(self).to(y.dtype), self.base_layer.bias
        return (y * s if bias is None else torch.addcmul(bias.to(y.dtype), y - bias, s)).to(x.dtype)


class FastBOFTConv2d(BOFTConv2d):
    """PEFT's BOFT on a convolution: the kernel is rotated factor by factor, 2 out d b m flops."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output for x (b, channels, h, w), in x's dtype."""
        if _left_to_peft(self) or _only_peft_can(self):
            return super().forward(x, *args, **kwargs)
        base = self.base_layer
        kernel, bias = _base(self, base.weight.dtype)
        W = kernel.flatten(1)
        for name in _active(self):
            W = rotate_butterfly(W, _butterfly(self, name), transpose=True)
        W = W * _scale(self)[:, None].to(W.dtype)
        y = F.conv2d(x.to(W.dtype), W.view(kernel.shape), bias, stride=base.stride, padding=base.padding)
        return y.to(x.dtype)


FAST: dict[type, type] = {
    HRALinear: FastHRALinear,
    HRAConv2d: FastHRAConv2d,
    BOFTLinear: FastBOFTLinear,
    BOFTConv2d: FastBOFTConv2d,
}


def _active(layer: Any) -> list[str]:
    tensors = layer.boft_R if isinstance(layer, BOFTLinear | BOFTConv2d) else layer.hra_u
    return [name for name in layer.active_adapters if name in tensors]


def _left_to_peft(layer: Any) -> bool:
    """Whether no rotation has to be computed (merged, disabled, none active), or PEFT was told not to cast."""
    return layer.disable_adapters or layer.merged or not layer.cast_input_dtype_enabled or not _active(layer)


def _only_peft_can(layer: Any) -> bool:
    """Whether PEFT drops some of BOFT's blocks at random, or uses one adapter's permutations for all of them."""
    drops = layer.training and any(not isinstance(layer.boft_dropout[name], nn.Identity) for name in _active(layer))
    # PEFT keeps one set of permutations for a layer, that of the adapter added last.
    shapes = {A.shape for A in layer.boft_R.values()}
    return drops or (len(shapes) > 1 and max(shape[0] for shape in shapes) > 1)


def _butterfly(layer: Any, name: str) -> Tensor:
    """The blocks (m, D, b, b) of one adapter: `(I - S)(I + S)⁻¹` for the skew part S of what is trained."""
    A = layer.boft_R[name]
    with torch.autocast(device_type=A.device.type, enabled=False):
        return cayley((A.mT - A) / 2)


def _scale(layer: Any) -> Tensor:
    """The product of the active adapters' scales (out)."""
    return reduce(torch.mul, (layer.boft_s[name].flatten() for name in _active(layer)))


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
