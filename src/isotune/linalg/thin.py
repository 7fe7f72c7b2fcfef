"""`y + a (x L) R` for thin L (in x r) and R (r x out): the one product that low-rank changes and rotations share.

Cost for n rows: 2 n r (in + out) flops forward, twice that backward. Saved for backward: x, L, R, and x L (n x r);
nothing of the size of y, and no copy of x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def thin_add(x: Tensor, L: Tensor, R: Tensor, y: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """`y + scale (x L) R` for rows x (..., in) and y (..., out); y is x itself by default, and then out is in.

    x, L, R and y have one dtype, in which everything is computed, whatever the autocast state. Differentiable twice,
    and under `torch.func` and `torch.compile`.
    """
    rows = x.reshape(-1, x.shape[-1])
    target = None if y is None else y.reshape(-1, y.shape[-1])
    with torch.autocast(device_type=x.device.type, enabled=False):
        out, _ = _ThinAdd.apply(rows, L, R, target, scale)
    return out.view(*x.shape[:-1], R.shape[-1])


class _ThinAdd(torch.autograd.Function):
    """Returns the product and Z = x L; Z is an output so that it can be saved and still be differentiated twice."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, L: Tensor, R: Tensor, y: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
        Z = x @ L
        return torch.addmm(x if y is None else y, Z, R, alpha=scale), Z

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, L, R, y, ctx.scale = inputs
        ctx.rotates = y is None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, L, R, output[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, gZ: Tensor | None) -> tuple[Tensor | None, ...]:
        x, L, R, Z = ctx.saved_tensors
        a = ctx.scale
        if g is not None:
            inner = g @ R.mT if a == 1 else a * (g @ R.mT)
            gZ = inner if gZ is None else inner + gZ
        if gZ is None:
            return None, None, None, None, None
        need_x, need_L, need_R, need_y, _ = ctx.needs_input_grad
        gx = gL = gR = None
        if need_x:
            # For a rotation the gradient that passes straight through is added in the same product.
            gx = torch.addmm(g, gZ, L.mT) if ctx.rotates and g is not None else gZ @ L.mT
        if need_L:
            gL = x.mT @ gZ
        if need_R and g is not None:
            gR = Z.mT @ g if a == 1 else a * (Z.mT @ g)
        return gx, gL, gR, g if need_y else None, None
