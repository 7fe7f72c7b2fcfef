"""A random projection P (N x D) of few numbers onto many that is never formed: random signs around one transform.

    P z = T H S z / √N     for every m numbers of the output, m the least power of two from D on

z is filled up with zeros to m numbers, S and T are diagonals of random signs, drawn anew for every m outputs, and H
(m x m) is Walsh's and Hadamard's matrix of 1 and -1. Every entry of P is 1/√N or -1/√N: its columns have length one,
they are orthogonal in expectation, and exactly where N is a multiple of m.

Fastfood (Le, Sarlós and Smola, ICML 2013, arXiv 1408.3060) has a Gaussian diagonal and a permutation between two such
transforms, for it stands for a Gaussian matrix; its columns have length one in expectation only. After: Ailon and
Chazelle, "The Fast Johnson-Lindenstrauss Transform and Approximate Nearest Neighbors", SIAM J. Comput., 2009. Cost:
N log2 m additions, and two bytes of signs for each output.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def walsh_hadamard(x: Tensor) -> Tensor:
    """`x H` for rows x (..., m), m a power of two, and H (m, m) of entries 1 and -1, in Hadamard's order."""
    shape, half = x.shape, 1
    while half < shape[-1]:
        a, b = x.reshape(*shape[:-1], -1, 2, half).unbind(-2)
        x = torch.stack([a + b, a - b], dim=-2)
        half *= 2
    return x.reshape(shape)


def random_signs(n: int, D: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """S (blocks, m) and T (n) of `project` from D numbers to n, as -1 and 1 in int8."""
    m = 1 << (D - 1).bit_length()
    counts = (-(-n // m), m), (n,)
    S, T = (torch.randint(0, 2, size, generator=generator, dtype=torch.int8).mul_(2).sub_(1) for size in counts)
    return S, T


def project(z: Tensor, S: Tensor, T: Tensor) -> Tensor:
    """`√N P z` (n) of z (D), for the n rows of P whose signs are S (blocks, m) and T (n); differentiable in z."""
    rows = walsh_hadamard(S * pad(z, (0, S.shape[-1] - len(z))))
    return rows.flatten()[: len(T)] * T
