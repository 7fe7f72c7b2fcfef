"""Thin parts of a matrix: each decomposition against its definition, with signs that do not depend on the machine."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from isotune.linalg.triplets import (
    context_triplets,
    fused,
    leading_qr,
    orthonormality_error,
    random_triplets,
    singular_triplets,
)

sizes = st.tuples(st.integers(2, 12), st.integers(2, 12))


def drawn(m: int, n: int, seed: int = 0) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(n: int, rows: int) -> Tensor:
    X = drawn(rows, n, 7) * torch.logspace(-2, 1, n, dtype=torch.float64)
    return X.mT @ X / rows


@given(sizes, st.integers(0, 99))
def test_largest_and_smallest_triplets_add_up_to_the_matrix(size: tuple[int, int], seed: int) -> None:
    W = drawn(*size, seed)
    k = min(size)
    r = seed % (k - 1) + 1
    largest, smallest = singular_triplets(W, r), singular_triplets(W, k - r, smallest=True)
    total = sum(U @ S.diag() @ Vh for U, S, Vh in (largest, smallest))
    torch.testing.assert_close(total, W)
    torch.testing.assert_close(torch.cat([largest[1], smallest[1]]), torch.linalg.svdvals(W))


@given(sizes, st.integers(0, 99))
def test_signs_are_those_of_the_largest_entries_whatever_the_precision(size: tuple[int, int], seed: int) -> None:
    W = drawn(*size, seed)
    U, _, Vh = singular_triplets(W, min(size))
    assert (U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()
    single = singular_triplets(W.float(), min(size))
    torch.testing.assert_close(single[0].double() @ single[2].double(), U @ Vh, rtol=0, atol=1e-3)


def test_random_triplets_come_to_the_exact_ones_as_fast_as_promised() -> None:
    U, V = (torch.linalg.qr(drawn(n, 30))[0] for n in (50, 40))
    S = 0.7 ** torch.arange(30, dtype=torch.float64)
    W = U @ S.diag() @ V.mT
    exact = sum(s * torch.outer(u, v) for s, u, v in zip(S[:3], U.T[:3], V.T[:3], strict=True))
    errors = []
    for niter in (0, 1, 3):
        found = random_triplets(W, 3, niter, torch.Generator().manual_seed(0))
        errors.append(float((found[0] @ found[1].diag() @ found[2] - exact).norm()))
    assert errors[0] > 1e-4
    assert errors[1] < 0.1 * errors[0]
    assert errors[2] < 1e-3 * errors[1]


def test_random_triplets_of_a_matrix_narrower_than_the_oversampling_are_exact() -> None:
    W = drawn(6, 5)
    found, exact = random_triplets(W, 3, 0, torch.Generator()), singular_triplets(W, 3)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("smallest", [False, True])
@pytest.mark.parametrize("rows", [200, 4])
def test_context_triplets_reproduce_w_and_are_those_of_w_times_the_covariance(rows: int, smallest: bool) -> None:
    W, C = drawn(7, 9), covariance(9, rows)
    U, S, Vh = context_triplets(W, C, 7)
    torch.testing.assert_close(U @ S.diag() @ Vh, W, rtol=0, atol=1e-8)
    damped = C / C.diagonal().mean() + 0.01 * torch.eye(9, dtype=C.dtype)
    torch.testing.assert_close(S, torch.linalg.svdvals(W @ damped))
    torch.testing.assert_close(U.mT @ U, torch.eye(7, dtype=C.dtype))
    keep = slice(-3, None) if smallest else slice(3)
    part = context_triplets(W, C, 3, smallest)
    torch.testing.assert_close(part[0] @ part[1].diag() @ part[2], U[:, keep] @ S[keep].diag() @ Vh[keep])


def test_damping_grows_until_the_inverse_is_one() -> None:
    C, W = torch.ones(40, 40), torch.randn(30, 40)
    barely = C + 1e-9 * torch.eye(40)  # in fp32 that is C, of rank one
    inverse, failed = torch.linalg.inv_ex(barely)
    assert failed or torch.dist(barely @ inverse, torch.eye(40)) > 0.05
    U, S, Vh = context_triplets(W, C, 30, damping=1e-9)
    assert (U @ S.diag() @ Vh - W).norm() < 0.2 * W.norm()


@given(sizes, st.integers(0, 99))
def test_leading_qr_reproduces_the_first_columns(size: tuple[int, int], seed: int) -> None:
    W = drawn(*size, seed)
    r = seed % min(size) + 1
    Q, R = leading_qr(W, r)
    torch.testing.assert_close(Q.mT @ Q, torch.eye(r, dtype=W.dtype))
    torch.testing.assert_close((Q @ R)[:, :r], W[:, :r])
    assert (R.diagonal() >= 0).all()


def test_fused_factors_have_one_product_and_the_values_where_they_are_wanted() -> None:
    U, S, Vh = singular_triplets(drawn(6, 5), 3)
    for fuse in ("UV", "U", "V"):
        B, A = fused(U, S, Vh, fuse)
        torch.testing.assert_close(B @ A, U @ S.diag() @ Vh)
    assert torch.equal(fused(U, S, Vh, "U")[1], Vh)
    assert torch.equal(fused(U, S, Vh, "V")[0], U)


def test_orthonormality_error_counts_lengths_and_angles() -> None:
    V = torch.linalg.qr(drawn(6, 3))[0]
    assert orthonormality_error(V) < 1e-12
    torch.testing.assert_close(orthonormality_error(2 * V), torch.tensor(3 * 3**0.5, dtype=V.dtype))
    torch.testing.assert_close(orthonormality_error(2 * V, squared=True), torch.tensor(27.0, dtype=V.dtype))
    V[:, 1] = V[:, 0]
    torch.testing.assert_close(orthonormality_error(V), torch.tensor(2**0.5, dtype=V.dtype))


def test_autocast_and_half_precision_change_nothing_but_the_values_read() -> None:
    W, C = drawn(7, 9).bfloat16(), covariance(9, 50).float()
    generator = torch.Generator()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [
            *singular_triplets(W, 3), *context_triplets(W, C, 3), *leading_qr(W, 3),
            *random_triplets(W, 3, 1, generator.manual_seed(0)),
        ]  # fmt: skip
    exact = [
        *singular_triplets(W.float(), 3), *context_triplets(W.float(), C, 3), *leading_qr(W.float(), 3),
        *random_triplets(W.float(), 3, 1, generator.manual_seed(0)),
    ]  # fmt: skip
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)
