"""The leading part of W = P L D U against torch's whole decomposition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from isotune.linalg.ldu import leading_ldu


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    """Any W of full rank."""
    shape = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    return torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 999)))).double()


@given(weights())
def test_all_factors_of_it_multiply_to_the_weight(W: Tensor) -> None:
    PL, D, U = leading_ldu(W, min(W.shape))
    torch.testing.assert_close(PL * D @ U, W, rtol=0, atol=1e-10)
    torch.testing.assert_close(U.diagonal(), torch.ones_like(D))
    torch.testing.assert_close(U.tril(-1), torch.zeros_like(U))


@given(weights(), st.data())
def test_thin_decomposition_is_the_front_of_torchs_whole_one(W: Tensor, data: st.DataObject) -> None:
    r = data.draw(st.integers(1, min(W.shape)))
    P, L, U = torch.linalg.lu(W)
    D = U.diagonal()[:r]
    for got, expected in zip(leading_ldu(W, r), ((P @ L)[:, :r], D, U[:r] / D[:, None]), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    "W",
    [
        torch.zeros(4, 5),
        torch.ones(4, 5),
        torch.randn(4, 2) @ torch.randn(2, 6),
        torch.cat([torch.zeros(5, 2), torch.randn(5, 4)], dim=1),
        torch.tensor([[0.0, 1.0], [0.0, 2.0]]),
    ],
    ids=["zero", "ones", "low rank", "dead inputs", "zero pivot"],
)
def test_zero_pivots_divide_nothing_and_keep_the_product(W: Tensor) -> None:
    PL, D, U = leading_ldu(W, min(W.shape))
    assert (D != 0).all()
    assert U.abs().max() <= 1 / torch.finfo(torch.float32).eps
    torch.testing.assert_close(PL * D @ U, W, rtol=0, atol=1e-5)
