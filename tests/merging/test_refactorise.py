"""FedSVD on the server: the mean of what clients sent, a new factorisation of it, and momentum carried over."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from isotune.errors import OptionError
from isotune.training.refactorise import aggregate, refactorise


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_near(got: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * max(1.0, float(expected.abs().max())))


def eye(r: int) -> Tensor:
    return torch.eye(r, dtype=torch.float64)


@st.composite
def factors(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """B and A with B of any rank from 1 to r."""
    n_out, n_in, seed = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(0, 99))
    r = draw(st.integers(1, min(n_out, n_in)))
    rank = draw(st.integers(1, r))
    return drawn(n_out, rank, seed=seed) @ drawn(rank, r, seed=seed + 1), drawn(r, n_in, seed=seed + 2)


@given(factors())
def test_new_factors_are_the_same_product_with_orthonormal_rows_and_descending_columns(
    pair: tuple[Tensor, Tensor],
) -> None:
    B, A = refactorise(*pair)
    assert_near(B @ A, pair[0] @ pair[1])
    assert_near(A @ A.mT, eye(len(A)))
    S = torch.linalg.svdvals(pair[0] @ pair[1])[: len(A)]
    assert_near(B.mT @ B, torch.diag(S.square()))
    # The complement lies in the span of the old rows.
    assert_near(A @ torch.linalg.pinv(pair[1]) @ pair[1], A, 1e-8)


def test_signs_do_not_depend_on_those_of_the_factors() -> None:
    B, A = drawn(7, 3), drawn(3, 6, seed=1)
    flip = torch.tensor([1.0, -1.0, -1.0], dtype=B.dtype)
    for got, expected in zip(refactorise(B * flip, flip[:, None] * A), refactorise(B, A), strict=True):
        assert_near(got, expected)
    once = refactorise(B, A)
    for got, expected in zip(refactorise(*once), once, strict=True):
        assert_near(got, expected)
    assert (once[0].gather(0, once[0].abs().argmax(0, keepdim=True)) > 0).all()


def test_single_precision_loses_no_more_than_its_rounding() -> None:
    B, A = drawn(40, 8).float(), drawn(8, 50, seed=1).float()
    new = refactorise(B, A)
    assert new[0].dtype == new[1].dtype == torch.float32
    error = (new[0].double() @ new[1].double() - B.double() @ A.double()).norm() / (B.double() @ A.double()).norm()
    assert error < 1e-7


def test_change_of_zero_is_left_alone_and_too_large_a_rank_refused() -> None:
    A = drawn(3, 6)
    B, same = refactorise(torch.zeros(7, 3), A)
    assert same is A
    assert not B.any()
    with pytest.raises(OptionError, match="rank 5 on a layer whose smaller side is 4"):
        refactorise(drawn(9, 5), drawn(5, 4))


def test_mean_of_the_products_is_the_product_of_the_mean() -> None:
    A, Bs, sizes = drawn(3, 6), [drawn(7, 3, seed=s) for s in range(3)], [10, 1, 5]
    expected = sum(n * B @ A for B, n in zip(Bs, sizes, strict=True)) / 16
    assert_near(aggregate(Bs, sizes) @ A, expected)
    assert torch.equal(aggregate(Bs[:1], [7]), Bs[0])
    for wrong in ([], [1.0, 2.0], [1.0, 2.0, 0.0]):
        with pytest.raises(OptionError, match="a positive size for each"):
            aggregate(Bs, wrong)


def test_gradient_beside_orthonormal_rows_is_no_larger_than_that_of_the_weight() -> None:
    _, A = refactorise(drawn(7, 3), 5 * drawn(3, 6, seed=1))
    G = drawn(7, 6, seed=2)
    assert (G @ A.mT).norm() < G.norm() < (G @ (5 * drawn(3, 6, seed=1)).mT).norm()
