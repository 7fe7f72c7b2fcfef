"""Algebra on factored matrices, compared with the dense product."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from isotune.linalg import low_rank
from isotune.linalg.low_rank import (
    SVD,
    Factored,
    at_most_full_rank,
    dense_svd,
    from_dense,
    inner,
    norm,
    principal_cosines,
    rounding,
    row_squares,
    row_squares_of_sum,
    safe_norms,
    singular_values,
    svd,
    tail,
    truncated,
    weighted_sum,
)

sizes = st.integers(1, 9)
ranks = st.integers(0, 12)


def drawn(*shapes: tuple[int, int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def factored(m: int, n: int, r: int, seed: int = 0) -> Factored:
    return Factored(*drawn((m, r), (r, n), seed=seed))


def orthonormal(m: int, k: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(*drawn((m, k), seed=seed)).Q


def close(one: Tensor, other: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * max(1.0, float(other.abs().sum())))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(0, 999))
def test_row_lengths_of_a_sum_are_those_of_the_dense_sum(m: int, n: int, r: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    W, B, A = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((m, n), (m, r), (r, n)))
    squares = row_squares_of_sum(W, B, A, row_squares(W))
    torch.testing.assert_close(squares, (W + B @ A).square().sum(1), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(safe_norms(squares, row_squares(W)), (W + B @ A).norm(dim=1), rtol=1e-6, atol=1e-6)


def test_row_that_cancels_or_is_zero_has_a_small_positive_length() -> None:
    W = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    B, A = torch.tensor([[-1.0], [0.0]]), W[:1].clone()
    norms = safe_norms(row_squares_of_sum(W, B, A, row_squares(W)), row_squares(W))
    assert (norms > 0).all()
    assert norms[0] < 1e-2
    assert norms[1] < 1e-15
    # However rounding falls, also below zero.
    assert safe_norms(torch.tensor([-1e-6]), torch.tensor([25.0])).isfinite().all()


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 9))
def test_factors_keep_their_product_and_get_no_more_columns_than_the_smaller_side(m: int, n: int, r: int) -> None:
    torch.manual_seed(0)
    B, A = torch.randn(m, r, dtype=torch.float64), torch.randn(r, n, dtype=torch.float64)
    left, right = at_most_full_rank(B, A)
    assert left.shape == (m, min(m, n, r))
    torch.testing.assert_close(left @ right, B @ A)
    if r <= min(m, n):
        assert left is B
        assert right is A


@given(sizes, sizes, ranks)
def test_factored_stands_for_the_dense_product(m: int, n: int, r: int) -> None:
    matrix = factored(m, n, r)
    W = matrix.B @ matrix.A
    assert matrix.shape == W.shape == (m, n)
    assert matrix.rank == r
    close(matrix.dense(), W)
    close(matrix.transposed.dense(), W.mT)
    close(matrix.scaled(-2.5).dense(), -2.5 * W)
    left, right = drawn((3, m), (n, 4), seed=1)
    close(matrix.times(left, right).dense(), left @ W @ right)
    close(matrix.times(left).dense(), left @ W)
    close(matrix.times(right=right).dense(), W @ right)


@given(sizes, sizes, ranks)
def test_svd_is_that_of_the_dense_product(m: int, n: int, r: int) -> None:
    matrix = factored(m, n, r)
    k = min(m, n, r)
    U, S, V = found = svd(matrix)
    assert (U.shape, S.shape, V.shape) == ((m, k), (k,), (n, k))
    close(U.mT @ U, torch.eye(k, dtype=torch.float64))
    close(V.mT @ V, torch.eye(k, dtype=torch.float64))
    close(S, torch.linalg.svdvals(matrix.dense())[:k])
    close(singular_values(*matrix)[:k], S)
    close(U * S @ V.mT, matrix.dense())
    close(found.factored().dense(), matrix.dense())
    # The split is even, and the signs are fixed: the entry of largest size in each column of U is positive.
    B, A = found.factored()
    close(B.mT @ B, A @ A.mT)
    assert all(column[column.abs().argmax()] > 0 for column in U.mT)


def test_svd_does_not_depend_on_how_the_matrix_is_split() -> None:
    matrix = factored(9, 7, 3)
    (mixing,) = drawn((3, 3), seed=1)
    other = Factored(-matrix.B @ mixing, -torch.linalg.inv(mixing) @ matrix.A)
    for one, two in zip(svd(matrix), svd(other), strict=True):
        close(one, two, 1e-10)


def test_svd_keeps_the_dtype_and_small_singular_values_in_single_precision() -> None:
    S = torch.logspace(0, -6, 40, dtype=torch.float64)
    U, V, mixing = orthonormal(300, 40), orthonormal(200, 40, seed=1), orthonormal(40, 40, seed=2)
    # Factors of which no column stands for one singular value.
    matrix = Factored((U * S.sqrt() @ mixing).float(), (mixing.mT @ (S.sqrt()[:, None] * V.mT)).float())
    found = svd(matrix)
    assert {part.dtype for part in found} == {torch.float32}
    torch.testing.assert_close(found.S.double(), S, rtol=1e-3, atol=0)


@given(sizes, sizes, st.integers(1, 9), ranks)
def test_truncation_is_the_best_approximation_with_its_error(m: int, n: int, r: int, rank: int) -> None:
    matrix = factored(m, n, r)
    W = matrix.dense()
    found, error = truncated(matrix, rank)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    close(found.dense(), U[:, :rank] * S[:rank] @ Vh[:rank])
    assert found.rank == min(m, n, r, rank)
    assert error == pytest.approx(float((W - found.dense()).norm() / W.norm()), abs=1e-12)


def test_zero_has_no_support_and_no_error() -> None:
    zero = Factored(torch.zeros(5, 3), torch.ones(3, 4))
    assert svd(zero).supported().S.shape == (0,)
    assert truncated(zero, 1)[1] == tail(torch.zeros(3), 1) == 0
    assert norm(zero) == 0
    assert from_dense(torch.zeros(5, 4), 2)[0].dense().equal(torch.zeros(5, 4))
    assert from_dense(torch.zeros(5, 4), 2)[1] == 0
    empty = svd(factored(5, 4, 0))
    assert empty.supported().factored().dense().equal(torch.zeros(5, 4, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("m", "n", "r"), [(12, 9, 3), (64, 200, 20), (600, 500, 8)])
def test_support_is_the_rank_in_both_forms(m: int, n: int, r: int, dtype: torch.dtype) -> None:
    matrix = Factored(*(part.to(dtype) for part in factored(m, n, r)))
    (mixing,) = drawn((r, r), seed=1)
    twice = weighted_sum([matrix, Factored(matrix.B @ mixing.to(dtype), matrix.A)], [1.0, 0.1])
    assert len(svd(twice).supported().S) == r
    found = dense_svd(matrix.dense()).supported()
    assert [part.shape for part in found] == [(m, r), (r,), (n, r)]
    close((found.U * found.S @ found.V.mT), matrix.dense(), 1e3 * torch.finfo(dtype).eps)


def test_support_has_a_tolerance() -> None:
    found = SVD(torch.eye(4), torch.tensor([1.0, 1e-2, 1e-6, 1e-7]), torch.eye(4))
    assert len(found.supported().S) == 3
    assert len(found.supported(1e-2).S) == 1
    assert len(found.supported(0.0).S) == 4
    assert rounding(4, torch.float32) < 1e-6 < rounding(4096, torch.float32) < 1e-5


@given(sizes, sizes, st.lists(st.integers(0, 4), min_size=1, max_size=4))
def test_weighted_sum_is_exact(m: int, n: int, of_rank: list[int]) -> None:
    terms = [factored(m, n, r, seed) for seed, r in enumerate(of_rank)]
    weights = [0.5 - seed for seed in range(len(terms))]
    found = weighted_sum(terms, weights)
    assert found.rank == sum(of_rank)
    close(found.dense(), sum((w * term.dense() for w, term in zip(weights, terms, strict=True)), torch.zeros(())))


def test_weighted_sum_wants_a_weight_for_each_term() -> None:
    with pytest.raises(ValueError, match="nothing to add"):
        weighted_sum([], [])
    with pytest.raises(ValueError, match="shorter"):
        weighted_sum([factored(3, 3, 1)], [])


@given(sizes, sizes, ranks, ranks)
def test_inner_products_and_norms_are_those_of_the_dense_matrices(m: int, n: int, r: int, s: int) -> None:
    one, other = factored(m, n, r), factored(m, n, s, seed=1)
    scale = 1 + float(one.dense().norm() * other.dense().norm())
    assert inner(one, other) == pytest.approx(float((one.dense() * other.dense()).sum()), abs=1e-12 * scale)
    assert norm(one) == pytest.approx(float(one.dense().norm()), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_norm_is_exact_where_terms_cancel(dtype: torch.dtype, least: float) -> None:
    matrix = factored(200, 150, 6)
    (mixing,) = drawn((6, 6), seed=1)
    same = Factored(matrix.B @ mixing, torch.linalg.inv(mixing) @ matrix.A)
    parts = [Factored(*(part.to(dtype) for part in term)) for term in (matrix, same)]
    assert norm(weighted_sum(parts, [1.0, -1.0])) < 10 * least * norm(parts[0])


def test_principal_cosines_are_those_of_the_angles_between_the_spaces() -> None:
    basis = orthonormal(9, 9)
    angles = torch.tensor([0.3, 1.1], dtype=torch.float64)
    V = basis[:, :2] * angles.cos() + basis[:, 2:4] * angles.sin()
    close(principal_cosines(basis[:, :2], V), angles.cos())
    turned = basis[:, :2] @ orthonormal(2, 2, seed=1)
    close(principal_cosines(turned, basis[:, :5]), torch.ones(2, dtype=torch.float64))
    close(principal_cosines(basis[:, :3], basis[:, 3:5]), torch.zeros(2, dtype=torch.float64))
    assert principal_cosines(basis[:, :0], basis).shape == (0,)
    single = orthonormal(50, 20).float()
    assert (single.mT @ single).max() > 1  # so that acos of an unclamped cosine would not be a number
    assert principal_cosines(single, single).max() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("m", "n", "rank"), [(30, 20, 4), (20, 30, 40), (400, 300, 8), (300, 400, 5)])
def test_from_dense_finds_a_low_rank_matrix_and_its_error(m: int, n: int, rank: int, dtype: torch.dtype) -> None:
    # The two smaller by SVD, the two larger by random projection.
    W = factored(m, n, min(rank, m, n)).dense().to(dtype)
    found, error = from_dense(W, rank)
    assert found.B.dtype == found.A.dtype == dtype
    assert found.rank == min(rank, m, n)
    eps = torch.finfo(dtype).eps
    close(found.dense(), W, 100 * eps)
    assert error < 20 * eps
    again, _ = from_dense(W, rank)
    assert again.B.equal(found.B)


@pytest.mark.parametrize(("m", "n", "rank"), [(60, 50, 9), (400, 300, 8)])
def test_from_dense_is_near_the_best_approximation_and_measures_its_error(m: int, n: int, rank: int) -> None:
    S = 0.8 ** torch.arange(min(m, n), dtype=torch.float64)
    W = orthonormal(m, len(S)) * S @ orthonormal(n, len(S), seed=1).mT
    found, error = from_dense(W, rank)
    assert error == pytest.approx(float((W - found.dense()).norm() / W.norm()), rel=1e-9)
    assert error == pytest.approx(tail(S, rank), rel=1e-3)
    close(W.mT, from_dense(W.mT, 50)[0].dense(), 1e-2)


def test_a_product_with_a_weight_in_low_precision_is_wide_and_makes_no_whole_copy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    W, X = torch.randn(37, 16).bfloat16(), torch.randn(16, 3)
    monkeypatch.setattr(low_rank, "_AT_ONCE", 5 * 16)
    assert torch.equal(low_rank.wide_product(W, X), torch.cat([rows.float() @ X for rows in W.split(5)]))
    torch.testing.assert_close(low_rank.wide_product(W, X), W.float() @ X)
    assert low_rank.row_squares(W).dtype == torch.float32
