"""The fast cosine and Fourier transforms against their definitions, in values and in gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import vmap

from isotune.linalg.dct import dct, dct_columns, dct_matrix, idct
from isotune.linalg.fourier import real_fourier, real_fourier_transpose

LENGTHS = [1, 2, 3, 4, 7, 8, 12, 13]
on_all_lengths = pytest.mark.parametrize("n", LENGTHS)


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@on_all_lengths
def test_dct_matrix_is_the_cosines_of_its_definition_and_orthonormal(n: int) -> None:
    C = dct_matrix(n)
    for k in range(n):
        for j in range(n):
            cosine = torch.cos(torch.tensor(torch.pi * (2 * j + 1) * k / (2 * n), dtype=torch.float64))
            assert C[k, j] == pytest.approx(float((2 / n) ** 0.5 * cosine * (0.5**0.5 if k == 0 else 1)))
    torch.testing.assert_close(C @ C.mT, torch.eye(n, dtype=C.dtype), rtol=0, atol=1e-12)


@on_all_lengths
def test_fast_transform_is_the_product_with_the_matrix_and_its_inverse_that_with_the_transpose(n: int) -> None:
    x, C = rows(2, 3, n), dct_matrix(n)
    torch.testing.assert_close(dct(x), x @ C.mT, rtol=0, atol=1e-12)
    torch.testing.assert_close(idct(x), x @ C, rtol=0, atol=1e-12)
    torch.testing.assert_close(idct(dct(x)), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("transform", [dct, idct, real_fourier])
@pytest.mark.parametrize("n", [1, 4, 5])
def test_transforms_are_twice_differentiable_and_run_under_vmap(transform: object, n: int) -> None:
    x = rows(2, n)
    assert torch.autograd.gradcheck(transform, x)
    # Quadratic, so that there is a second derivative to compare.
    assert torch.autograd.gradgradcheck(lambda x: transform(x).square().sum(), x)  # type: ignore[operator]
    torch.testing.assert_close(vmap(transform)(x), transform(x))  # type: ignore[operator]


@on_all_lengths
def test_real_fourier_takes_turns_with_the_parts_of_the_complex_transform(n: int) -> None:
    x = rows(3, n)
    expected = torch.fft.fft(x)[:, : n // 2 + 1]
    torch.testing.assert_close(real_fourier(x)[:, ::2], expected.real)
    torch.testing.assert_close(real_fourier(x)[:, 1::2], expected.imag)


@on_all_lengths
def test_transpose_of_real_fourier_is_that_of_its_matrix(n: int) -> None:
    F = real_fourier(torch.eye(n, dtype=torch.float64)).mT
    z = rows(3, 2 * (n // 2 + 1))
    torch.testing.assert_close(real_fourier_transpose(z, n), z @ F, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda z: real_fourier_transpose(z, n), z)


def test_nothing_of_the_rows_is_saved_for_backward() -> None:
    saved: list[int] = []
    x = torch.randn(50, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        real_fourier(idct(dct(x))).sum()
    assert saved == []


@on_all_lengths
def test_columns_on_demand_are_those_of_the_matrix(n: int) -> None:
    columns = torch.arange(n).flip(0)
    torch.testing.assert_close(dct_columns(n, columns), dct_matrix(n)[:, columns].mT, rtol=0, atol=1e-12)


def test_columns_of_a_long_transform_keep_full_precision_where_large_angles_would_lose_it() -> None:
    n = 30_001
    C = dct_columns(n, torch.tensor([0, 17, n // 2, n - 1]))
    # Sums of n products: far less than what an angle of π n² would lose, which is n² eps.
    torch.testing.assert_close(C @ C.mT, torch.eye(4, dtype=C.dtype), rtol=0, atol=n * torch.finfo(C.dtype).eps)
