"""Compact WY of 33 to 256 columns, in tiles: what `wy` does, where r x r numbers are too many for one block.

The inverse has launches of its own, since it would take longer than all else if every block of rows made it. Tiles of
32 x 32; R = r padded to 64, 128 or 256, so that there are 2, 4 or 8 tiles a side. Other letters are those of `wy`;
STEPS blocks of rows are summed by one program, so that n parts are few.
"""

from __future__ import annotations

import triton
import triton.language as tl

from isotune.kernels.wy import inverse, load, scaled, store, unit


@triton.jit
def gram_tiles(U, G, TOP, d, r, STEPS: tl.constexpr, R: tl.constexpr, T: tl.constexpr, BD: tl.constexpr):
    p = tl.program_id(0)
    a = tl.program_id(1) * T + tl.arange(0, T)
    b = tl.program_id(2) * T + tl.arange(0, T)
    tops_a = tl.zeros((T,), tl.float32)
    tops_b = tl.zeros((T,), tl.float32)
    for step in range(STEPS):
        i = (p * STEPS + step) * BD + tl.arange(0, BD)
        tops_a = tl.maximum(tops_a, tl.max(tl.abs(load(U, i, a, d, r)), axis=0))
        tops_b = tl.maximum(tops_b, tl.max(tl.abs(load(U, i, b, d, r)), axis=0))
    g = tl.zeros((T, T), tl.float32)
    for step in range(STEPS):
        i = (p * STEPS + step) * BD + tl.arange(0, BD)
        left = scaled(load(U, i, a, d, r), tops_a)
        right = scaled(load(U, i, b, d, r), tops_b)
        g += tl.dot(tl.trans(left), right, input_precision="ieee")
    tl.store(G + p * R * R + a[:, None] * R + b[None, :], g)
    if tl.program_id(1) == tl.program_id(2):
        tl.store(TOP + p * R + a, tops_a)


@triton.jit
def _lengths(G, TOP, j, n: tl.constexpr, R: tl.constexpr, T: tl.constexpr):
    """The largest entries of columns j, and `top / |u|`, zero for a zero column."""
    top = tl.zeros((T,), tl.float32)
    for k in range(n):
        top = tl.maximum(top, tl.load(TOP + k * R + j))
    squares = tl.zeros((T,), tl.float32)
    for k in range(n):
        part = tl.load(TOP + k * R + j) / tl.where(top > 0, top, 1.0)
        squares += tl.load(G + k * R * R + j * R + j) * part * part
    return top, tl.where(squares > 0, 1.0 / tl.sqrt(tl.where(squares > 0, squares, 1.0)), 0.0)


@triton.jit
def sum_and_invert(G, TOP, GRAM, SCALE, X, n: tl.constexpr, R: tl.constexpr, T: tl.constexpr, LEVELS: tl.constexpr):
    """ÛᵀÛ from its parts, and in X the inverses of the tiles on the diagonal, zero below them."""
    a = tl.program_id(0) * T + tl.arange(0, T)
    b = tl.program_id(1) * T + tl.arange(0, T)
    tile = a[:, None] * R + b[None, :]
    top_a, inv_a = _lengths(G, TOP, a, n, R, T)
    top_b, inv_b = _lengths(G, TOP, b, n, R, T)
    gram = tl.zeros((T, T), tl.float32)
    for k in range(n):
        part_a = tl.load(TOP + k * R + a) / tl.where(top_a > 0, top_a, 1.0)
        part_b = tl.load(TOP + k * R + b) / tl.where(top_b > 0, top_b, 1.0)
        gram += tl.load(G + k * R * R + tile) * part_a[:, None] * part_b[None, :]
    gram = gram * inv_a[:, None] * inv_b[None, :]
    tl.store(GRAM + tile, gram)
    if tl.program_id(0) == tl.program_id(1):
        tl.store(X + tile, 2.0 * inverse(gram, T, LEVELS))
        tl.store(SCALE + a, top_a)
        tl.store(SCALE + R + a, inv_a)
    else:
        tl.store(X + tile, tl.zeros((T, T), tl.float32))


@triton.jit
def join(GRAM, X, R: tl.constexpr, T: tl.constexpr, HALF: tl.constexpr):
    """Join 2 (I + N)⁻¹ of neighbouring diagonal blocks of HALF tiles: what stands between them is -A B C / 2."""
    row = tl.program_id(2) * 2 * HALF + tl.program_id(0)
    column = tl.program_id(2) * 2 * HALF + HALF + tl.program_id(1)
    t = tl.arange(0, T)
    i = (row * T + t)[:, None] * R
    j = (column * T + t)[None, :]
    x = tl.zeros((T, T), tl.float32)
    for k in range(HALF):
        middle = (tl.program_id(2) * 2 * HALF + k) * T + t
        bc = tl.zeros((T, T), tl.float32)
        for m in range(HALF):
            right = (tl.program_id(2) * 2 * HALF + HALF + m) * T + t
            b = 2.0 * tl.load(GRAM + middle[:, None] * R + right[None, :])
            bc += tl.dot(b, tl.load(X + right[:, None] * R + j), input_precision="ieee")
        x -= tl.dot(tl.load(X + i + middle[None, :]), bc, input_precision="ieee")
    tl.store(X + i + j, 0.5 * x)


@triton.jit
def forward_tiles(U, X, SCALE, UNIT, MT, d, r, R: tl.constexpr, T: tl.constexpr, BD: tl.constexpr):
    i = tl.program_id(0) * BD + tl.arange(0, BD)
    t = tl.arange(0, T)
    j = tl.program_id(1) * T + t
    m = tl.zeros((BD, T), tl.float32)
    for tile in range(R // T):
        k = tile * T + t
        x = tl.load(X + j[:, None] * R + k[None, :])
        m += tl.dot(unit(U, SCALE, i, k, d, r, R), tl.trans(x), input_precision="ieee")
    store(UNIT, i, j, unit(U, SCALE, i, j, d, r, R), d, r)
    store(MT, i, j, m, d, r)


@triton.jit
def sums_tiles(U, SCALE, GU, GM, P, D, d, r, STEPS: tl.constexpr, R: tl.constexpr, T: tl.constexpr, BD: tl.constexpr):
    p = tl.program_id(0)
    a = tl.program_id(1) * T + tl.arange(0, T)
    b = tl.program_id(2) * T + tl.arange(0, T)
    s = tl.zeros((T, T), tl.float32)
    w = tl.zeros((T,), tl.float32)
    for step in range(STEPS):
        i = (p * STEPS + step) * BD + tl.arange(0, BD)
        u = unit(U, SCALE, i, b, d, r, R)
        s += tl.dot(tl.trans(load(GM, i, a, d, r)), u, input_precision="ieee")
        w += tl.sum(u * load(GU, i, b, d, r), axis=0)
    tl.store(P + p * R * R + a[:, None] * R + b[None, :], s)
    if tl.program_id(1) == tl.program_id(2):
        tl.store(D + p * R + b, w)


@triton.jit
def left(X, P, A, n: tl.constexpr, R: tl.constexpr, T: tl.constexpr):
    """A = Tᵀ P, summed over the parts of P."""
    t = tl.arange(0, T)
    a = tl.program_id(0) * T + t
    b = tl.program_id(1) * T + t
    out = tl.zeros((T, T), tl.float32)
    for tile in range(R // T):
        k = tile * T + t
        s = tl.zeros((T, T), tl.float32)
        for part in range(n):
            s += tl.load(P + part * R * R + k[:, None] * R + b[None, :])
        out += tl.dot(tl.trans(tl.load(X + k[:, None] * R + a[None, :])), s, input_precision="ieee")
    tl.store(A + a[:, None] * R + b[None, :], out)


@triton.jit
def symmetric(X, A, S, R: tl.constexpr, T: tl.constexpr):
    """S = s + sᵀ with s = striu(A Tᵀ, 1); a program makes a tile on or above the diagonal and what mirrors it."""
    t = tl.arange(0, T)
    a = tl.program_id(0) * T + t
    b = tl.program_id(1) * T + t
    if tl.program_id(0) <= tl.program_id(1):
        s = tl.zeros((T, T), tl.float32)
        for tile in range(R // T):
            k = tile * T + t
            x = tl.load(X + b[:, None] * R + k[None, :])
            s += tl.dot(tl.load(A + a[:, None] * R + k[None, :]), tl.trans(x), input_precision="ieee")
        s = tl.where(a[:, None] < b[None, :], s, 0.0)
        if tl.program_id(0) == tl.program_id(1):
            s = s + tl.trans(s)
        tl.store(S + a[:, None] * R + b[None, :], s)
        tl.store(S + b[:, None] * R + a[None, :], tl.trans(s))


@triton.jit
def backward_tiles(
    U,
    X,
    GRAM,
    SCALE,
    GU,
    GM,
    A,
    S,
    D,
    GRAD,
    d,
    r,
    n: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    BD: tl.constexpr,
):
    i = tl.program_id(0) * BD + tl.arange(0, BD)
    t = tl.arange(0, T)
    j = tl.program_id(1) * T + t
    w = tl.load(A + j * R + j)
    for part in range(n):
        w += tl.load(D + part * R + j)
    g = load(GU, i, j, d, r)
    for tile in range(R // T):
        k = tile * T + t
        s = tl.load(S + k[:, None] * R + j[None, :])
        w -= tl.sum(tl.load(GRAM + k[:, None] * R + j[None, :]) * s, axis=0)
        x = tl.load(X + k[:, None] * R + j[None, :])
        g += tl.dot(load(GM, i, k, d, r), x, input_precision="ieee")
        g -= tl.dot(unit(U, SCALE, i, k, d, r, R), s, input_precision="ieee")
    g -= unit(U, SCALE, i, j, d, r, R) * w[None, :]
    store(GRAD, i, j, scaled(g, tl.load(SCALE + j)) * tl.load(SCALE + R + j)[None, :], d, r)
