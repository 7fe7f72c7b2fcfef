"""The orthonormal DCT-II along the last dimension, by one real FFT of the same length (Makhoul 1980).

    (x Cᵀ)_k = s_k Σ_j x_j cos(π (2 j + 1) k / 2n),   s_0 = √(1/n), s_k = √(2/n);   C is n x n and C Cᵀ = I

Because C is orthonormal, the inverse is the transpose, and each of the two is the other's gradient. Cost: O(n log n)
for each row, and nothing is saved for backward.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from isotune.linalg.autograd import Node


def dct(x: Tensor) -> Tensor:
    """`x Cᵀ` for rows x (..., n), in fp32 or fp64."""
    return _Cosine.run(x, False)


def idct(x: Tensor) -> Tensor:
    """`x C` for rows x (..., n): the inverse of `dct`."""
    return _Cosine.run(x, True)


def dct_matrix(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """C (n x n) itself: the slow twin of `dct`."""
    k, j = torch.arange(n, dtype=dtype)[:, None], torch.arange(n, dtype=dtype)
    C = math.sqrt(2 / n) * torch.cos(math.pi * (2 * j + 1) * k / (2 * n))
    C[0] /= math.sqrt(2)
    return C


def dct_columns(n: int, columns: Tensor) -> Tensor:
    """The columns of C (n x n) of the given indices (r), as rows (r, n) in float64, the same bits on every machine.

    The angles are reduced in whole numbers, and the cosine is a polynomial: IEEE 754 leaves no step to the library.
    """
    m = (2 * columns.cpu()[:, None] + 1) * torch.arange(n) % (4 * n)
    m = torch.minimum(m, 4 * n - m)  # cos(2π - t) = cos t
    sign = 1.0 - 2.0 * (m > n)
    m = torch.minimum(m, 2 * n - m)  # cos(π - t) = -cos t
    angle = m.double() * (math.pi / (2 * n))
    square, cosine = angle * angle, torch.ones_like(angle)
    for i in range(11, 0, -1):  # Horner's scheme of the Taylor series: its rest is below 1e-19 up to π / 2
        cosine = 1 - square / (2 * i * (2 * i - 1)) * cosine
    C = sign * cosine * math.sqrt(2 / n)
    C[:, 0] = math.sqrt(1 / n)
    return C


class _Cosine(Node):
    @staticmethod
    def forward(x: Tensor, inverse: bool) -> Tensor:
        return _inverse(x) if inverse else _forward(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.inverse = inputs[1]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return _Cosine.run(g, not ctx.inverse), None


def _forward(x: Tensor) -> Tensor:
    n = x.shape[-1]
    # Even entries, then odd ones backwards: their FFT, turned by half a step, is the DCT up to scale.
    v = torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], dim=-1)
    V = torch.fft.rfft(v) * _turn(x)
    X = torch.cat([V.real, -V.imag[..., 1 : (n + 1) // 2].flip(-1)], dim=-1)
    return X * _scale(x)


def _inverse(x: Tensor) -> Tensor:
    n = x.shape[-1]
    X = x / _scale(x)
    mirrored = torch.nn.functional.pad(X, (0, 1)).flip(-1)  # X_n = 0, X_{n-1}, ..., X_0
    V = torch.complex(X[..., : n // 2 + 1], -mirrored[..., : n // 2 + 1]) * _turn(x).conj()
    v = torch.fft.irfft(V, n)
    half = (n + 1) // 2
    even, odd = v[..., :half], v[..., half:].flip(-1)
    pairs = torch.stack([even, torch.nn.functional.pad(odd, (0, half - odd.shape[-1]))], dim=-1)
    return pairs.flatten(-2)[..., :n]


def _turn(x: Tensor) -> Tensor:
    """exp(-i π k / 2n) for k = 0 ... n // 2."""
    n = x.shape[-1]
    angle = torch.arange(n // 2 + 1, dtype=x.dtype, device=x.device) * (-math.pi / (2 * n))
    return torch.complex(angle.cos(), angle.sin())


def _scale(x: Tensor) -> Tensor:
    n = x.shape[-1]
    scale = torch.full((n,), math.sqrt(2 / n), dtype=x.dtype, device=x.device)
    scale[0] = math.sqrt(1 / n)
    return scale
