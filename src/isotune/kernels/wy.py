"""Compact WY of up to 32 columns: two launches forward, two backward, fp32 algebra whatever comes in or goes out.

    Û = U / |U|,   M = T Ûᵀ,   T = S⁻¹,   2 S = I + N,   N = 2 striu(ÛᵀÛ, 1)

forward     every block of rows makes its part of UᵀU; then each sums the parts, inverts S, and writes its rows of
            Û and Mᵀ
backward    all sums over d that are needed are  P = g_M Û (r x r)  and  D = diag(Ûᵀ g_Û) (r), since M = T Ûᵀ

A column is divided by its largest entry before it is squared, in each block by that of the block, so that columns
of any length are exact. Letters: d rows, r columns, R = r padded to a power of two, BD rows in a block, of
which one program sums STEPS, so that there are n parts.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scaled(u, top):
    """u (rows, R) with every column divided by `top` (R), where that is not zero."""
    return u / tl.where(top > 0, top, 1.0)[None, :]


@triton.jit
def inverse(gram, R: tl.constexpr, LEVELS: tl.constexpr):
    """`(I + 2 striu(gram, 1))⁻¹` (R x R), by joining the inverses of diagonal blocks of 1, 2, 4, ... rows.

    Where A and C are inverses of neighbouring blocks and B stands between them, that of the larger block has -A B C.
    """
    i = tl.arange(0, R)[:, None]
    j = tl.arange(0, R)[None, :]
    X = tl.where(i == j, 1.0, 0.0)
    for level in tl.static_range(LEVELS):
        between = (i < j) & ((i >> (level + 1)) == (j >> (level + 1))) & ((i >> level) != (j >> level))
        B = tl.where(between, 2.0 * gram, 0.0)
        X = X - tl.dot(tl.dot(X, B, input_precision="ieee"), X, input_precision="ieee")
    return X


@triton.jit
def load(X, i, j, d, r):
    """Rows i, columns j of X (d, r) in fp32, zero outside."""
    own = (i < d)[:, None] & (j < r)[None, :]
    return tl.load(X + i[:, None] * r + j[None, :], mask=own, other=0.0).to(tl.float32)


@triton.jit
def store(X, i, j, x, d, r):
    """Write rows i, columns j of X (d, r) in its dtype, and nothing outside."""
    own = (i < d)[:, None] & (j < r)[None, :]
    tl.store(X + i[:, None] * r + j[None, :], x.to(X.dtype.element_ty), mask=own)


@triton.jit
def unit(U, SCALE, i, j, d, r, R: tl.constexpr):
    """Rows i, columns j of Û."""
    return scaled(load(U, i, j, d, r), tl.load(SCALE + j)) * tl.load(SCALE + R + j)[None, :]


@triton.jit
def gram(U, G, TOP, d, r, STEPS: tl.constexpr, R: tl.constexpr, BD: tl.constexpr):
    p = tl.program_id(0)
    j = tl.arange(0, R)
    top = tl.zeros((R,), tl.float32)
    for step in range(STEPS):
        i = (p * STEPS + step) * BD + tl.arange(0, BD)
        top = tl.maximum(top, tl.max(tl.abs(load(U, i, j, d, r)), axis=0))
    g = tl.zeros((R, R), tl.float32)
    for step in range(STEPS):
        i = (p * STEPS + step) * BD + tl.arange(0, BD)
        u = scaled(load(U, i, j, d, r), top)
        g += tl.dot(tl.trans(u), u, input_precision="ieee")
    tl.store(TOP + p * R + j, top)
    tl.store(G + p * R * R + j[:, None] * R + j[None, :], g)


@triton.jit
def forward(
    U,
    G,
    TOP,
    UNIT,
    MT,
    T,
    GRAM,
    SCALE,
    d,
    r,
    n: tl.constexpr,
    R: tl.constexpr,
    LEVELS: tl.constexpr,
    BD: tl.constexpr,
):
    p = tl.program_id(0)
    i = p * BD + tl.arange(0, BD)
    j = tl.arange(0, R)
    square = j[:, None] * R + j[None, :]
    top = tl.zeros((R,), tl.float32)
    for k in range(n):
        top = tl.maximum(top, tl.load(TOP + k * R + j))
    gram = tl.zeros((R, R), tl.float32)
    for k in range(n):
        part = tl.load(TOP + k * R + j) / tl.where(top > 0, top, 1.0)
        gram += tl.load(G + k * R * R + square) * part[:, None] * part[None, :]
    squares = tl.sum(tl.where(j[:, None] == j[None, :], gram, 0.0), axis=0)
    # The length of a column is top / inv; that of a zero column counts as infinite.
    inv = tl.where(squares > 0, 1.0 / tl.sqrt(tl.where(squares > 0, squares, 1.0)), 0.0)
    gram = gram * inv[:, None] * inv[None, :]
    t = 2.0 * inverse(gram, R, LEVELS)

    u = scaled(load(U, i, j, d, r), top) * inv[None, :]
    store(UNIT, i, j, u, d, r)
    store(MT, i, j, tl.dot(u, tl.trans(t), input_precision="ieee"), d, r)
    if p == 0:
        tl.store(T + square, t)
        tl.store(GRAM + square, gram)
        tl.store(SCALE + j, top)
        tl.store(SCALE + R + j, inv)


@triton.jit
def sums(U, SCALE, GU, GM, P, D, d, r, STEPS: tl.constexpr, R: tl.constexpr, BD: tl.constexpr):
    p = tl.program_id(0)
    j = tl.arange(0, R)
    s = tl.zeros((R, R), tl.float32)
    w = tl.zeros((R,), tl.float32)
    for step in range(STEPS):
        i = (p * STEPS + step) * BD + tl.arange(0, BD)
        u = unit(U, SCALE, i, j, d, r, R)
        s += tl.dot(tl.trans(load(GM, i, j, d, r)), u, input_precision="ieee")
        w += tl.sum(u * load(GU, i, j, d, r), axis=0)
    tl.store(P + p * R * R + j[:, None] * R + j[None, :], s)
    tl.store(D + p * R + j, w)


@triton.jit
def backward(U, T, GRAM, SCALE, GU, GM, P, D, GRAD, d, r, n: tl.constexpr, R: tl.constexpr, BD: tl.constexpr):
    p = tl.program_id(0)
    i = p * BD + tl.arange(0, BD)
    j = tl.arange(0, R)
    square = j[:, None] * R + j[None, :]
    a = tl.zeros((R, R), tl.float32)
    w = tl.zeros((R,), tl.float32)
    for k in range(n):
        a += tl.load(P + k * R * R + square)
        w += tl.load(D + k * R + j)
    t = tl.load(T + square)
    a = tl.dot(tl.trans(t), a, input_precision="ieee")
    s = tl.dot(a, tl.trans(t), input_precision="ieee")
    s = tl.where(j[:, None] < j[None, :], s, 0.0)
    s = s + tl.trans(s)
    # diag(Ûᵀ g) of the whole gradient g of Û, which is what is not tangential.
    w += tl.sum(tl.where(j[:, None] == j[None, :], a, 0.0), axis=0) - tl.sum(tl.load(GRAM + square) * s, axis=0)

    u = unit(U, SCALE, i, j, d, r, R)
    g = load(GU, i, j, d, r) + tl.dot(load(GM, i, j, d, r), t, input_precision="ieee")
    g = g - tl.dot(u, s, input_precision="ieee") - u * w[None, :]
    store(GRAD, i, j, scaled(g, tl.load(SCALE + j)) * tl.load(SCALE + R + j)[None, :], d, r)
