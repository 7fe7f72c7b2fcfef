"""The discrete Fourier transform as a real matrix, and its transpose, along the last dimension.

    (x Fᵀ)_2k = Σ_j x_j cos(2π j k / n),   (x Fᵀ)_2k+1 = -Σ_j x_j sin(2π j k / n),   k = 0 ... n // 2

F is (2 (n // 2 + 1) x n): real and imaginary parts take turns, and conjugate frequencies appear once. Each of the
two is the other's gradient. Cost: O(n log n) for each row, and nothing is saved for backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from isotune.linalg.autograd import Node


def real_fourier(x: Tensor) -> Tensor:
    """`x Fᵀ` for rows x (..., n), in fp32 or fp64: (..., 2 (n // 2 + 1))."""
    return _Fourier.run(x, x.shape[-1], False)


def real_fourier_transpose(z: Tensor, n: int) -> Tensor:
    """`z F` for z (..., 2 (n // 2 + 1)): rows (..., n)."""
    return _Fourier.run(z, n, True)


class _Fourier(Node):
    @staticmethod
    def forward(x: Tensor, n: int, transpose: bool) -> Tensor:
        if not transpose:
            return torch.view_as_real(torch.fft.rfft(x)).flatten(-2)
        Z = torch.view_as_complex(x.contiguous().unflatten(-1, (-1, 2)))
        # irfft counts every frequency twice but those that are their own conjugates, and divides by n.
        weight = torch.full((n // 2 + 1,), n / 2, dtype=x.dtype, device=x.device)
        weight[0] = n
        if n % 2 == 0:
            weight[-1] = n
        return torch.fft.irfft(Z * weight, n)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.n, ctx.transpose = inputs

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return _Fourier.run(g, ctx.n, not ctx.transpose), None, None
