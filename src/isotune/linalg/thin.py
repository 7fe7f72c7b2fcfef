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
    with torch.autocast(device_type=x.device.type, enabled=False):
        if y is None:
            out, _ = _ThinRotation.apply(rows, L, R, scale)
        else:
            out = torch.addmm(y.reshape(-1, y.shape[-1]), rows @ L, R, alpha=scale)
    return out.view(*x.shape[:-1], R.shape[-1])


class _ThinRotation(torch.autograd.Function):
    """`x + a (x L) R` and Z = x L, which is an output so that it can be saved and still be differentiated twice.

    autograd alone would pass over x once more backward, to add the gradient that goes straight through.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, L: Tensor, R: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        Z = x @ L
        return torch.addmm(x, Z, R, alpha=scale), Z

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, L, R, ctx.scale = inputs
        ctx.save_for_backward(x, L, R, output[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor, gZ: Tensor) -> tuple[Tensor | None, ...]:
        x, L, R, Z = ctx.saved_tensors
        need_x, need_L, need_R, _ = ctx.needs_input_grad
        gZ = torch.addmm(gZ, g, R.mT, alpha=ctx.scale)
        return (
            torch.addmm(g, gZ, L.mT) if need_x else None,
            x.mT @ gZ if need_L else None,
            ctx.scale * (Z.mT @ g) if need_R else None,
            None,
        )
