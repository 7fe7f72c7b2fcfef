"""`linalg.householder.compact_wy`, in any dtype, on a GPU in two launches forward and two backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isotune.kernels import choice
from isotune.linalg import householder
from isotune.linalg.autograd import Node
from isotune.linalg.precision import rounded

LARGEST = 256
"""The most columns there are kernels for."""


def compact_wy(U: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """(Û, M) with `H_1 ... H_r = I - Û M` for columns U (d, r), as `linalg.householder.compact_wy` computes them.

    They are rounded to `dtype` at the end; by default they stay in fp32 or better. Differentiable twice, and under
    `torch.func` and `torch.compile`; a zero column has gradient zero.
    """
    if U.shape[1] <= LARGEST and choice.runs(U):
        unit, MT, *_ = _CompactWY.run(U, dtype or torch.float32)
        return unit, MT.mT
    return rounded(householder.compact_wy(U), dtype)


class _CompactWY(Node):
    """What the kernels make, of which backward keeps r x r numbers beside U itself."""

    @staticmethod
    def forward(U: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return choice.operator(_forward, "compact_wy")(U.contiguous(), dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        T, gram, scale = output[2:]
        ctx.mark_non_differentiable(T, gram, scale)
        ctx.save_for_backward(inputs[0], T, gram, scale)

    @staticmethod
    def backward(ctx: Any, g_unit: Tensor, g_MT: Tensor, *_: Any) -> tuple[Tensor, None]:
        U, T, gram, scale = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _differentiable(U, g_unit, g_MT), None
        return choice.operator(_backward, "compact_wy_backward")(U.contiguous(), T, gram, scale, g_unit, g_MT), None


def _differentiable(U: Tensor, g_unit: Tensor, g_MT: Tensor) -> Tensor:
    """The gradient by the portable form, which can be differentiated again."""
    unit, M = householder.compact_wy(U)
    grads = g_unit.to(unit.dtype), g_MT.mT.to(M.dtype)
    return torch.autograd.grad((unit, M), U, grads, create_graph=True)[0]


def _forward(U: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from isotune.kernels import launch

    return launch.forward(U, dtype)


def _backward(U: Tensor, T: Tensor, gram: Tensor, scale: Tensor, g_unit: Tensor, g_MT: Tensor) -> Tensor:
    from isotune.kernels import launch

    return launch.backward(U, T, gram, scale, g_unit, g_MT)


def _forward_shapes(U: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    d, r = U.shape
    R = choice.padded(r)
    unit, MT = (U.new_empty(d, r, dtype=dtype) for _ in range(2))
    T, gram = (U.new_empty(R, R, dtype=torch.float32) for _ in range(2))
    return unit, MT, T, gram, U.new_empty(2, R, dtype=torch.float32)


torch.library.custom_op("isotune::compact_wy", _forward, mutates_args=()).register_fake(_forward_shapes)
torch.library.custom_op("isotune::compact_wy_backward", _backward, mutates_args=()).register_fake(
    lambda U, T, gram, scale, g_unit, g_MT: torch.empty_like(U)
)
