"""`linalg.cayley.rotation`, on a GPU in one launch forward and one backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isotune.kernels import choice
from isotune.linalg import cayley
from isotune.linalg.autograd import Node

LARGEST = 64
"""The largest block there is a kernel for."""


def rotation(upper: Tensor, b: int, terms: int | None = None) -> Tensor:
    """R (..., b, b) for the numbers above the diagonals of Q (..., b (b - 1) / 2): `linalg.cayley.rotation`.

    Differentiable twice, and under `torch.func` and `torch.compile`.
    """
    if terms is None and 2 <= b <= LARGEST and choice.runs(upper):
        return _Cayley.run(upper.reshape(-1, upper.shape[-1]), b).view(*upper.shape[:-1], b, b)
    return cayley.rotation(upper, b, terms)


class _Cayley(Node):
    """R, of which backward needs nothing else."""

    @staticmethod
    def forward(upper: Tensor, b: int) -> Tensor:
        return choice.operator(_forward, "cayley")(upper.contiguous(), b)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.b, ctx.dtype = inputs[1], inputs[0].dtype
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        upper, R = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            again = cayley.rotation(upper, ctx.b)
            return torch.autograd.grad(again, upper, g, create_graph=True)[0], None
        return choice.operator(_backward, "cayley_backward")(upper, R, g.contiguous()), None


def _forward(upper: Tensor, b: int) -> Tensor:
    from isotune.kernels import cayley as kernel

    R = upper.new_empty(len(upper), b, b, dtype=torch.float32)
    with torch.cuda.device_of(upper):
        kernel.forward[(len(upper),)](upper, R, upper.shape[1], b, B=choice.padded(b))
    return R


def _backward(upper: Tensor, R: Tensor, g: Tensor) -> Tensor:
    from isotune.kernels import cayley as kernel

    out, b = torch.empty_like(upper, memory_format=torch.contiguous_format), R.shape[1]
    with torch.cuda.device_of(upper):
        kernel.backward[(len(R),)](R, g, out, upper.shape[1], b, B=choice.padded(b))
    return out


torch.library.custom_op("isotune::cayley", _forward, mutates_args=()).register_fake(
    lambda upper, b: upper.new_empty(len(upper), b, b, dtype=torch.float32)
)
torch.library.custom_op("isotune::cayley_backward", _backward, mutates_args=()).register_fake(
    lambda upper, R, g: torch.empty_like(upper, memory_format=torch.contiguous_format)
)
