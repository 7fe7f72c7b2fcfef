"""The Cayley transform and its series: one sign, orthogonal, and as accurate as they say."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isotune.linalg.cayley import above_diagonal, cayley, cayley_neumann, rotation, skew, upper_of


def drawn_skew(b: int, seed: int, size: float = 1.0, batch: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    upper = size * torch.randn(batch, above_diagonal(b), generator=generator, dtype=torch.float64)
    return skew(upper, b)


@given(st.integers(2, 7), st.integers(0, 99))
def test_skew_puts_its_numbers_above_the_diagonal_row_by_row(b: int, seed: int) -> None:
    upper = torch.randn(2, 3, above_diagonal(b), generator=torch.Generator().manual_seed(seed))
    Q = skew(upper, b)
    assert Q.shape == (2, 3, b, b)
    assert torch.equal(Q, -Q.mT)
    assert torch.equal(Q[1, 2, 0, 1:], upper[1, 2, : b - 1])
    assert torch.equal(upper_of(Q), upper)


@given(st.integers(2, 7), st.integers(0, 99), st.sampled_from([0.1, 1.0, 10.0]))
def test_exact_form_is_a_rotation_and_minus_q_its_transpose(b: int, seed: int, size: float) -> None:
    Q = drawn_skew(b, seed, size)
    R, eye = cayley(Q), torch.eye(b, dtype=torch.float64)
    torch.testing.assert_close(R.mT @ R, eye.expand_as(R), rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.linalg.det(R), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(R @ (eye - Q), eye + Q)
    torch.testing.assert_close(cayley(-Q), R.mT)


@given(st.integers(2, 6), st.integers(3, 9), st.integers(0, 99))
def test_series_is_the_one_of_its_definition_and_minus_q_its_transpose(b: int, terms: int, seed: int) -> None:
    Q = drawn_skew(b, seed, 0.3)
    power = torch.linalg.matrix_power
    expected = sum(2 * power(Q, k) for k in range(1, terms - 1)) + torch.eye(b) + power(Q, terms - 1)
    torch.testing.assert_close(cayley_neumann(Q, terms), expected)
    torch.testing.assert_close(cayley_neumann(-Q, terms), cayley_neumann(Q, terms).mT)


def test_series_tends_to_the_exact_form_for_small_q_and_explodes_for_large_q() -> None:
    Q = drawn_skew(6, 0)
    Q = Q / torch.linalg.matrix_norm(Q, 2, keepdim=True)
    errors = [float((cayley_neumann(0.3 * Q, t) - cayley(0.3 * Q)).abs().max()) for t in range(3, 12)]
    assert all(later < 0.5 * earlier for earlier, later in itertools.pairwise(errors))
    assert errors[0] > 1e-3
    assert errors[-1] < 1e-4
    R = cayley_neumann(2 * Q, 12)
    assert (R.mT @ R - torch.eye(6)).abs().max() > 100


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_fp32_also_under_autocast(dtype: torch.dtype) -> None:
    Q = drawn_skew(5, 1).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for R in (cayley(Q), cayley_neumann(0.01 * Q.float(), 9)):
            assert R.dtype == torch.float32
            assert (R.mT.double() @ R.double() - torch.eye(5)).abs().max() < 1e-5


@pytest.mark.parametrize("terms", [None, 5])
def test_rotation_can_be_differentiated_twice_and_mapped(terms: int | None) -> None:
    upper = 0.3 * torch.randn(2, 3, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda u: rotation(u, 3, terms), upper.requires_grad_(), fast_mode=True)
    mapped = torch.func.vmap(lambda u: rotation(u, 3, terms))(upper)
    torch.testing.assert_close(mapped, rotation(upper, 3, terms))
