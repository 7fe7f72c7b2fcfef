"""Products of reflections: what hra.md calls invariants, in values and in gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from isotune.linalg.householder import (
    block_columns,
    compact_wy,
    dense_reflections,
    neumann_wy,
    orthogonality_penalty,
    orthonormal_basis,
    rotate,
    unit_columns,
)


@st.composite
def columns(draw: st.DrawFn, dtype: torch.dtype = torch.float64, largest: int = 12) -> Tensor:
    """Any U (d x r), r <= d, its columns of very different lengths."""
    d = draw(st.integers(1, largest))
    r = draw(st.integers(1, d))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    lengths = 10 ** (4 * torch.rand(r, generator=generator) - 2)
    return (torch.randn(d, r, generator=generator) * lengths).to(dtype)


def product(U: Tensor) -> Tensor:
    """H = I - U M, formed through `rotate`."""
    return rotate(torch.eye(U.shape[0], dtype=U.dtype), *compact_wy(unit_columns(U)))


def off_orthogonal(H: Tensor) -> float:
    return float((H.mT @ H - torch.eye(H.shape[0], dtype=H.dtype)).abs().max())


@given(columns())
def test_product_equals_the_reflections_one_after_another(U: Tensor) -> None:
    torch.testing.assert_close(product(U), dense_reflections(U), rtol=0, atol=1e-12)


def test_first_reflection_stands_next_to_the_weight() -> None:
    U = torch.randn(5, 3, dtype=torch.float64)
    H1, H2, H3 = (dense_reflections(U[:, i : i + 1]) for i in range(3))
    torch.testing.assert_close(product(U), H1 @ H2 @ H3)
    assert not torch.allclose(product(U), H3 @ H2 @ H1)


@given(columns())
def test_transpose_is_the_reflections_in_reverse_and_the_inverse(U: Tensor) -> None:
    eye = torch.eye(U.shape[0], dtype=U.dtype)
    Ht = rotate(eye, *compact_wy(unit_columns(U)), transpose=True)
    torch.testing.assert_close(Ht, product(U).mT, rtol=0, atol=1e-12)
    torch.testing.assert_close(Ht, dense_reflections(U.flip(1)), rtol=0, atol=1e-12)
    torch.testing.assert_close(Ht @ product(U), eye, rtol=0, atol=1e-12)


@given(columns(torch.float32, largest=40))
def test_product_is_orthogonal_to_fp32_for_columns_of_any_length(U: Tensor) -> None:
    assert off_orthogonal(product(U)) < 2e-6


@pytest.mark.parametrize("scale", [1e-36, 1e-18, 1e-9, 1.0, 1e9, 1e18, 1e36])
def test_extreme_lengths_stay_orthogonal_in_fp32(scale: float) -> None:
    U = torch.randn(32, 8) * scale
    U[:, ::2] /= scale
    assert off_orthogonal(product(U)) < 2e-6
    torch.testing.assert_close(product(U), product((U.double() / U.double().norm(dim=0)).float()))


@given(columns(), st.integers(0, 2**16))
def test_length_and_sign_of_a_column_do_not_matter(U: Tensor, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.randn(U.shape[1], generator=generator, dtype=U.dtype)
    scales = torch.where(scales.abs() < 1e-3, 1.0, scales)
    torch.testing.assert_close(product(U * scales), product(U), rtol=0, atol=1e-11)


@given(columns())
def test_determinant_is_minus_one_to_the_number_of_reflections(U: Tensor) -> None:
    assert torch.det(product(U)) == pytest.approx((-1) ** U.shape[1], abs=1e-9)


@given(columns(), st.integers(0, 2**16))
def test_singular_values_and_norm_of_a_weight_are_kept(U: Tensor, seed: int) -> None:
    W = torch.randn(7, U.shape[0], generator=torch.Generator().manual_seed(seed), dtype=U.dtype)
    rotated = rotate(W, *compact_wy(unit_columns(U)))
    torch.testing.assert_close(torch.linalg.svdvals(rotated), torch.linalg.svdvals(W), rtol=0, atol=1e-11)


def degenerate(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    U = torch.randn(6, 4, dtype=dtype)
    zero, repeated, opposite, nearly = (U.clone() for _ in range(4))
    zero[:, 1] = 0
    repeated[:, 2] = repeated[:, 0]
    opposite[:, 3] = -2 * opposite[:, 0]
    nearly[:, 1] = nearly[:, 0] * (1 + 1e-7)
    return {
        "one zero column": zero,
        "all columns zero": torch.zeros_like(U),
        "a repeated column": repeated,
        "an opposite column": opposite,
        "almost equal columns": nearly,
        "all columns equal": U[:, :1].expand(6, 4).clone(),
        "negative zero": -torch.zeros_like(U),
    }


@pytest.mark.parametrize("name", degenerate())
@pytest.mark.parametrize("basis", [unit_columns, orthonormal_basis], ids=["free", "strict"])
def test_zero_and_repeated_columns_give_an_orthogonal_product_and_finite_gradients(name: str, basis) -> None:
    U = degenerate()[name].requires_grad_()
    H = rotate(torch.eye(6), *compact_wy(basis(U)))
    assert off_orthogonal(H.detach()) < 2e-6
    (H * torch.randn(6, 6)).sum().backward()
    assert U.grad is not None
    assert U.grad.isfinite().all()


@pytest.mark.parametrize("name", degenerate())
@pytest.mark.parametrize("squared", [True, False])
def test_penalty_of_zero_and_repeated_columns_has_finite_gradients(name: str, squared: bool) -> None:
    U = degenerate()[name].requires_grad_()
    orthogonality_penalty(U, squared).backward()
    assert U.grad is not None
    assert U.grad.isfinite().all()


@pytest.mark.parametrize("squared", [True, False])
def test_penalty_of_an_orthonormal_basis_has_a_finite_gradient(squared: bool) -> None:
    U = torch.eye(6, 4).requires_grad_()
    penalty = orthogonality_penalty(U, squared)
    penalty.backward()
    assert penalty == 0
    assert U.grad is not None
    assert U.grad.isfinite().all()


def test_a_zero_column_stands_for_no_reflection() -> None:
    U = torch.randn(6, 3, dtype=torch.float64)
    padded = torch.cat([U[:, :1], torch.zeros(6, 1, dtype=U.dtype), U[:, 1:]], dim=1)
    torch.testing.assert_close(product(padded), product(U))


@given(columns())
def test_strict_basis_gives_a_symmetric_involution_with_trace_d_minus_2r(U: Tensor) -> None:
    d, r = U.shape
    Q = orthonormal_basis(U)
    torch.testing.assert_close(Q.mT @ Q, torch.eye(r, dtype=U.dtype), rtol=0, atol=1e-12)
    H = rotate(torch.eye(d, dtype=U.dtype), *compact_wy(Q))
    torch.testing.assert_close(H, H.mT, rtol=0, atol=1e-12)
    torch.testing.assert_close(H @ H, torch.eye(d, dtype=U.dtype), rtol=0, atol=1e-12)
    assert torch.trace(H) == pytest.approx(d - 2 * r, abs=1e-9)


@given(columns())
def test_strict_basis_spans_the_columns_in_their_order(U: Tensor) -> None:
    Q = orthonormal_basis(U)
    inside = torch.linalg.lstsq(Q, unit_columns(U)).solution
    torch.testing.assert_close(Q @ inside, unit_columns(U), rtol=0, atol=1e-9)
    torch.testing.assert_close(inside.tril(-1), torch.zeros_like(inside), rtol=0, atol=1e-9)


def test_strict_basis_drops_a_dependent_column_and_the_rest_stays_orthonormal() -> None:
    U = torch.randn(6, 3, dtype=torch.float64)
    repeated = torch.cat([U[:, :2], U[:, :1], U[:, 2:]], dim=1)
    Q = orthonormal_basis(repeated)
    assert (Q[:, 2] == 0).all()
    torch.testing.assert_close(Q[:, :2], orthonormal_basis(U[:, :2]))
    torch.testing.assert_close(Q.mT @ Q, torch.diag(torch.tensor([1.0, 1, 0, 1], dtype=Q.dtype)))


@given(columns())
def test_penalty_is_zero_exactly_where_the_columns_are_orthonormal(U: Tensor) -> None:
    assert orthogonality_penalty(orthonormal_basis(U) * 3.0) < 1e-20
    H = unit_columns(U).mT @ unit_columns(U)
    overlap = (H - torch.diag(H.diagonal())).square().sum()
    torch.testing.assert_close(orthogonality_penalty(U), overlap, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(orthogonality_penalty(U, squared=False), overlap.sqrt(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("squared", [True, False])
def test_penalty_cannot_separate_the_columns_of_a_pair(squared: bool) -> None:
    U = torch.randn(9, 3, dtype=torch.float64).repeat_interleave(2, dim=1).requires_grad_()
    (gradient,) = torch.autograd.grad(orthogonality_penalty(U, squared), U)
    torch.testing.assert_close(gradient[:, 0::2], gradient[:, 1::2])
    assert gradient.abs().max() > 0.01


@pytest.mark.parametrize("basis", [unit_columns, orthonormal_basis], ids=["free", "strict"])
@given(columns(largest=5))
def test_gradients_are_derivatives(basis, U: Tensor) -> None:
    v = torch.randn(3, U.shape[0], dtype=torch.float64, requires_grad=True)
    for transpose in (False, True):
        assert torch.autograd.gradcheck(
            lambda v, U, t=transpose: rotate(v, *compact_wy(basis(U)), t),
            (v, unit_columns(U).requires_grad_()),
            fast_mode=True,
        )


def test_penalty_gradients_are_derivatives() -> None:
    U = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(orthogonality_penalty, U)
    assert torch.autograd.gradcheck(lambda U: orthogonality_penalty(U, squared=False), U)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_columns_are_worked_on_in_fp32(dtype: torch.dtype) -> None:
    U = torch.randn(16, 6).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        Q, M = compact_wy(unit_columns(U.float()))
        assert Q.dtype == M.dtype == torch.float32
        assert orthonormal_basis(U).dtype == orthogonality_penalty(U).dtype == torch.float32
    assert off_orthogonal(torch.eye(16) - Q @ M) < 2e-6
    v = torch.randn(4, 16).to(dtype)
    assert rotate(v, Q, M).dtype == dtype


def test_nothing_of_size_d_by_d_is_formed() -> None:
    d, r = 4096, 8
    U = torch.randn(d, r, requires_grad=True)
    v = torch.randn(16, d, requires_grad=True)
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        rotate(v, *compact_wy(unit_columns(U))).sum().backward()
    assert max(sizes) <= d * 16


@given(st.integers(1, 2), st.integers(0, 99))
def test_two_terms_of_the_inverse_are_exact_for_up_to_two_columns(rank: int, seed: int) -> None:
    U = torch.randn(7, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    unit, M = neumann_wy(U)
    torch.testing.assert_close(torch.eye(7, dtype=U.dtype) - unit @ M, dense_reflections(U))


def test_two_terms_of_the_inverse_leave_out_the_products_of_three_columns() -> None:
    U = torch.randn(7, 3, dtype=torch.float64)
    unit, M = neumann_wy(U)
    third = 8 * (unit[:, 0] @ unit[:, 1]) * (unit[:, 1] @ unit[:, 2]) * torch.outer(unit[:, 0], unit[:, 2])
    torch.testing.assert_close(torch.eye(7, dtype=U.dtype) - unit @ M - third, dense_reflections(U))


def test_zero_column_is_no_reflection_for_two_terms_either_and_has_a_zero_gradient() -> None:
    U = torch.randn(7, 2, dtype=torch.float64)
    padded = torch.nn.functional.pad(U, (0, 1)).requires_grad_()
    unit, M = neumann_wy(padded)
    torch.testing.assert_close(torch.eye(7, dtype=U.dtype) - unit @ M, dense_reflections(U))
    (unit @ M).square().sum().backward()
    assert not padded.grad[:, 2].any()


def test_block_columns_lay_vectors_of_blocks_along_a_diagonal() -> None:
    u = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert torch.equal(block_columns(u), torch.block_diag(*u[:, :, None]))
