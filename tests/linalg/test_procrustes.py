"""The nearest rotation and the nearest scale."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from isotune.linalg.procrustes import LIMIT, best_scale, misfit, polar


def drawn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_polar_is_unitary_and_undoes_a_rotation(dtype: torch.dtype) -> None:
    X = drawn(3, 5, 8, dtype=dtype)
    R = polar(drawn(3, 5, 5, dtype=dtype, seed=1))
    torch.testing.assert_close(R @ R.mH, torch.eye(5, dtype=dtype).expand(3, 5, 5))
    torch.testing.assert_close(polar(R @ X @ X.mH), R)


def test_no_rotation_is_nearer_than_the_polar_factor() -> None:
    X, Y = drawn(4, 9), drawn(4, 9, seed=1)
    least = (polar(Y @ X.mT) @ X - Y).norm()
    others = torch.linalg.qr(drawn(500, 4, 4, seed=2))[0]
    assert least < (others @ X - Y).norm(dim=(1, 2)).min()


@given(st.integers(0, 200), st.booleans())
def test_no_scale_is_better_than_the_best(seed: int, signed: bool) -> None:
    X, Y, P, Q = (drawn(3, seed=4 * seed + i) * 10 ** float(drawn(1, seed=seed + i)) for i in range(4))
    terms = tuple(x.sum()[None] for x in (X * X, X * Y, P * P, P * Q))
    s = best_scale(*terms, signed=signed)
    tried = torch.logspace(-3, 3, 20001, dtype=torch.float64)
    if signed:
        tried = torch.cat([tried, -tried])
    least = misfit(tried, *terms).min()
    assert signed or s > 0
    assert misfit(s, *terms) <= least + 1e-9 * (1 + least.abs())
    torch.testing.assert_close(misfit(s, *terms) + Y @ Y + Q @ Q, (s * X - Y).square().sum()[None]
                               + (P / s - Q).square().sum())  # fmt: skip


def test_a_hidden_scale_is_found_and_nothing_to_scale_stays() -> None:
    X, P = drawn(6, 7), drawn(6, 7, seed=1)
    hidden = torch.tensor([0.5, -2.0, 30.0, 1.0, -0.01, 3.0], dtype=torch.float64)
    Y, Q = hidden[:, None] * X, P / hidden[:, None]
    terms = [(x * y).sum(1) for x, y in ((X, X), (X, Y), (P, P), (P, Q))]
    torch.testing.assert_close(best_scale(*terms, signed=True), hidden)
    nothing = torch.zeros_like(hidden)
    torch.testing.assert_close(best_scale(*terms[:2], nothing, nothing, signed=True), hidden)
    torch.testing.assert_close(best_scale(nothing, nothing, *terms[2:], signed=True), hidden)
    assert best_scale(*[nothing] * 4).equal(torch.ones(6, dtype=torch.float64))


def test_scales_stay_within_their_limit() -> None:
    one = torch.ones(1, dtype=torch.float64)
    # Nothing of P is wanted, and X is not there: the further P is scaled down, the better.
    s = best_scale(0 * one, 0 * one, one, -one)
    assert 1 / LIMIT <= float(s) <= LIMIT
