"""The Cayley transform of many small skew-symmetric matrices: one launch forward, one backward, fp32 inside.

    R = (I + Q)(I - Q)⁻¹ = 2 N - I,   N = (I - Q)⁻¹ = (R + I) / 2,   Q given by what is above its diagonal, row by row
    g_Q = 2 Nᵀ g_R Nᵀ = ½ (R + I)ᵀ g_R (R + I)ᵀ,   of which the numbers above the diagonal get g_Q - g_Qᵀ

Each program has one matrix in its registers. Gauss and Jordan need no pivots here: the symmetric part of I - Q is I.
Letters: b the size of a block, B = b padded to a power of two by the identity, K = b (b - 1) / 2.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def forward(Q, R, K, b, B: tl.constexpr):
    p = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, B)
    i = n[:, None]
    j = n[None, :]
    above = (i < j) & (j < b)
    q = tl.load(Q + p * K + i * b - (i * (i + 1)) // 2 + j - i - 1, mask=above, other=0.0).to(tl.float32)
    a = tl.where(i == j, 1.0, 0.0) - q + tl.trans(q)
    for k in range(B):
        row = tl.sum(tl.where(i == k, a, 0.0), axis=0)
        column = tl.where(n == k, 0.0, tl.sum(tl.where(j == k, a, 0.0), axis=1))
        pivot = tl.sum(tl.where(n == k, row, 0.0), axis=0)
        row = tl.where(n == k, 1.0, row) / pivot
        a = tl.where(j == k, 0.0, a) - column[:, None] * row[None, :]
        a = tl.where(i == k, row[None, :], a)
    r = 2.0 * a - tl.where(i == j, 1.0, 0.0)
    tl.store(R + p * b * b + i * b + j, r, mask=(i < b) & (j < b))


@triton.jit
def backward(R, G, GQ, K, b, B: tl.constexpr):
    p = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, B)
    i = n[:, None]
    j = n[None, :]
    own = (i < b) & (j < b)
    r = tl.load(R + p * b * b + i * b + j, mask=own, other=0.0) + tl.where(i == j, 1.0, 0.0)
    g = tl.load(G + p * b * b + i * b + j, mask=own, other=0.0).to(tl.float32)
    r = tl.trans(r)
    g = 0.5 * tl.dot(tl.dot(r, g, input_precision="ieee"), r, input_precision="ieee")
    g = g - tl.trans(g)
    place = GQ + p * K + i * b - (i * (i + 1)) // 2 + j - i - 1
    tl.store(place, g.to(GQ.dtype.element_ty), mask=(i < j) & (j < b))
