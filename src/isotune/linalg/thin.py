"""Thin changes `(x L) R` of linear maps, L (in x r) and R (r x out), which low-rank methods and rotations share.

    y + a (x L) R                   added to given outputs
    (x + a (x L) R) Wᵀ + b          before a frozen linear layer
    x Wᵀ + b + a (x L) (R Wᵀ)       the same through the layer, so that no changed rows are written
    x Wᵀ + b + a (x L) R            beside it
    x (W + a (L R)ᵀ)ᵀ + b           inside its weight, which is formed in forward and again in backward

Cost for n rows: 2 n r (in + out) flops forward, twice that backward; inside: 2 in out r flops each time, and for the
gradients 4 n r (in + out), since they are thin products too: no gradient of the weight is formed. Saved for backward:
x, L, R, x L (n x r), and W, which is the layer's own; nothing of the size of y, and no copy of x. Where W is given,
the gradient of x is made in one array, and so is the output beside W: on a CPU, fresh memory costs as much as the
thin products themselves.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from isotune.linalg.autograd import Node, transformed

Where = Literal["before", "through", "beside", "inside"]


def thin_add(x: Tensor, L: Tensor, R: Tensor, y: Tensor | None = None, scale: float = 1.0) -> Tensor:
    """`y + scale (x L) R` for rows x (..., in) and y (..., out); y is x itself by default, and then out is in.

    x, L, R and y have one dtype, in which everything is computed, whatever the autocast state. Differentiable twice,
    and under `torch.func` and `torch.compile`.
    """
    if y is None:
        return thin_linear("before", x, None, None, L, R, scale)
    with without_autocast(x):
        out = torch.addmm(_rows(y), _rows(x) @ L, R, alpha=scale)
    return out if y.dim() == 2 else out.view(y.shape)


def thin_linear(
    where: Where, x: Tensor, W: Tensor | None, b: Tensor | None, L: Tensor, R: Tensor, scale: float = 1.0
) -> Tensor:
    """`(x + scale (x L) R) Wᵀ + b` (before, through) or `x Wᵀ + b + scale (x L) R` (beside, inside), x (..., in).

    W (out, in) and b (out) are constants; without them the layer is the identity. Dtypes and derivatives are those
    of `thin_add`.
    """
    with without_autocast(x):
        if where == "inside":
            out = _InsideLinear.run(_rows(x), W, b, L, R, scale)
        elif where == "through":
            out, _, _ = _ThroughLinear.run(_rows(x), W, b, L, R, scale)
        else:
            out, _ = _ThinLinear.run(_rows(x), W, b, L, R, scale, where)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], out.shape[-1])


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """A context in which everything keeps its own dtype, on the device of x (any shape)."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(device_type=x.device.type, enabled=False)
    return nullcontext()


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


class _ThinLinear(Node):
    """The output and Z = x L, which is an output so that it can be saved and still be differentiated twice."""

    @staticmethod
    def forward(
        x: Tensor, W: Tensor | None, b: Tensor | None, L: Tensor, R: Tensor, scale: float, where: Where
    ) -> tuple[Tensor, Tensor]:
        Z = x @ L
        if W is None:
            return torch.addmm(x, Z, R, alpha=scale), Z
        if where == "before":
            return F.linear(torch.addmm(x, Z, R, alpha=scale), W, b), Z
        return _add_product(F.linear(x, W, b), Z, R, scale), Z

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, W, _, L, R, ctx.scale, where = inputs
        ctx.before = where == "before"
        need_W = ctx.before or ctx.needs_input_grad[0]
        ctx.save_for_backward(x, W if need_W else None, L, R, output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, g_Z: Tensor | None) -> tuple[Tensor | None, ...]:
        x, W, L, R, Z = ctx.saved_tensors
        need_x, need_L, need_R = (ctx.needs_input_grad[i] for i in (0, 3, 4))
        if g is None:
            g = x.new_zeros(len(x), R.shape[1] if W is None or not ctx.before else len(W))
        through = g if W is None else g @ W
        if ctx.before:
            g = through
        g_Z = _scaled(g, R.mT, ctx.scale, Z) if g_Z is None else torch.addmm(g_Z, g, R.mT, alpha=ctx.scale)
        g_R = _scaled(Z.mT, g, ctx.scale, R) if need_R else None
        g_L = (g_Z.mT @ x).mT if need_L else None
        g_x = None
        if need_x:
            g_x = torch.addmm(g, g_Z, L.mT) if W is None else _add_product(through, g_Z, L.mT)
        return g_x, None, None, g_L, g_R, None, None


class _ThroughLinear(Node):
    """The output, and Z = x L and R Wᵀ, which are outputs for the same reason."""

    @staticmethod
    def forward(
        x: Tensor, W: Tensor, b: Tensor | None, L: Tensor, R: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        Z, RW = x @ L, F.linear(R, W)
        return _add_product(F.linear(x, W, b), Z, RW, scale), Z, RW

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, W, _, L, _, ctx.scale = inputs
        ctx.save_for_backward(x, W, L, output[1], output[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, g_Z: Tensor | None, g_RW: Tensor | None) -> tuple[Tensor | None, ...]:
        x, W, L, Z, RW = ctx.saved_tensors
        need_x, need_L, need_R = (ctx.needs_input_grad[i] for i in (0, 3, 4))
        g = x.new_zeros(len(x), len(W)) if g is None else g
        g_Z = _scaled(g, RW.mT, ctx.scale, Z) if g_Z is None else torch.addmm(g_Z, g, RW.mT, alpha=ctx.scale)
        through = g @ W if need_x else None
        g_R = g_L = None
        if need_R:
            # g W is there where x wants its gradient; where it does not, Zᵀ g is the smaller way to it.
            g_R = (
                _scaled(Z.mT @ g, W, ctx.scale, L.mT) if through is None else _scaled(Z.mT, through, ctx.scale, L.mT)
            )
            g_R = g_R if g_RW is None else g_R + g_RW @ W
        if need_L:
            g_L = (g_Z.mT @ x).mT
        g_x = None if through is None else _add_product(through, g_Z, L.mT)
        return g_x, None, None, g_L, g_R, None


class _InsideLinear(Node):
    """`x (W + scale (L R)ᵀ)ᵀ + b`: cheapest for many rows."""

    @staticmethod
    def forward(x: Tensor, W: Tensor, b: Tensor | None, L: Tensor, R: Tensor, scale: float) -> Tensor:
        return F.linear(x, torch.addmm(W, R.mT, L.mT, alpha=scale), b)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, W, _, L, R, ctx.scale = inputs
        ctx.save_for_backward(x, W if ctx.needs_input_grad[0] else None, L, R)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, W, L, R = ctx.saved_tensors
        _, _, _, need_L, need_R, _ = ctx.needs_input_grad
        g_L = _scaled((g @ R.mT).mT, x, ctx.scale, L.mT).mT if need_L else None
        g_R = _scaled((x @ L).mT, g, ctx.scale, R) if need_R else None
        g_x = None if W is None else g @ torch.addmm(W, R.mT, L.mT, alpha=ctx.scale)
        return g_x, None, None, g_L, g_R, None


def _scaled(a: Tensor, b: Tensor, scale: float, like: Tensor) -> Tensor:
    """`scale a b`, a matrix of the shape of `like`, in one product."""
    return a @ b if scale == 1 else torch.addmm(like, a, b, beta=0, alpha=scale)


def _add_product(y: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
    """`y + scale a b`, in y itself, which is the caller's own, where nothing has to remember y."""
    # A mode that sees every operation may: a selective checkpoint keeps results and checks that they stay.
    if torch.is_grad_enabled() or transformed() or torch._C._len_torch_dispatch_stack():
        return torch.addmm(y, a, b, alpha=scale)
    return y.addmm_(a, b, alpha=scale)
