"""Tensor rings against traces entry by entry, and the identities that TLoRA rests on."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from isotune.linalg.tensor_ring import digit_sizes, ring_flops, ring_matrix, ring_products, ring_rows


@st.composite
def rings(draw: st.DrawFn) -> list[Tensor]:
    """Cores (I_d x J_d x r x r) of a ring."""
    r = draw(st.integers(1, 3))
    sizes = draw(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    return [torch.randn(*size, r, r, generator=generator, dtype=torch.float64) for size in sizes]


def digits(index: int, sizes: list[int]) -> list[int]:
    """The digits of an index, the first one counting ones."""
    out = []
    for size in sizes:
        out.append(index % size)
        index //= size
    return out


@given(rings())
def test_entries_are_traces_of_products(cores: list[Tensor]) -> None:
    left, right = ([core.shape[k] for core in cores] for k in (0, 1))
    T = ring_matrix(cores)
    assert T.shape == (math.prod(left), math.prod(right))
    for i, j in itertools.product(range(min(T.shape[0], 4)), range(min(T.shape[1], 4))):
        product = torch.eye(cores[0].shape[-1], dtype=torch.float64)
        for core, i_d, j_d in zip(cores, digits(i, left), digits(j, right), strict=True):
            product = product @ core[i_d, j_d]
        torch.testing.assert_close(T[i, j], product.trace())


@given(rings(), st.booleans())
def test_rows_through_the_ring_are_rows_times_its_matrix(cores: list[Tensor], transpose: bool) -> None:
    T = ring_matrix(cores)
    x = torch.randn(5, T.shape[0] if transpose else T.shape[1], dtype=torch.float64)
    torch.testing.assert_close(ring_rows(x, cores, transpose), x @ (T if transpose else T.mT))


@given(rings())
def test_products_of_a_vectors_cores_have_its_entries_as_traces(cores: list[Tensor]) -> None:
    vector = [core[:, 0] for core in cores]
    products = ring_products(vector)
    expected = ring_matrix([core[:, None] for core in vector])[:, 0]
    torch.testing.assert_close(products.diagonal(dim1=1, dim2=2).sum(1), expected)


@given(rings())
def test_product_with_the_transpose_is_a_ring_of_kronecker_products(cores: list[Tensor]) -> None:
    def gram(core: Tensor) -> Tensor:
        pairs = [[sum(torch.kron(a, b) for a, b in zip(u, v, strict=True)) for v in core] for u in core]
        return torch.stack([torch.stack(row) for row in pairs])

    T = ring_matrix(cores)
    torch.testing.assert_close(ring_matrix([gram(core) for core in cores]), T @ T.mT)


def test_ring_of_rank_one_is_a_kronecker_product_with_the_first_digit_last() -> None:
    cores = [torch.randn(n, n, 1, 1, dtype=torch.float64) for n in (2, 3, 4)]
    first, second, third = (core[:, :, 0, 0] for core in cores)
    torch.testing.assert_close(ring_matrix(cores), torch.kron(third, torch.kron(second, first)))


@pytest.mark.parametrize("r", [1, 2, 3])
def test_equal_cores_of_the_identity_over_r_make_the_identity(r: int) -> None:
    cores = [torch.eye(n, dtype=torch.float64)[:, :, None, None].expand(n, n, r, r) / r for n in (2, 3, 4)]
    torch.testing.assert_close(ring_matrix(cores), torch.eye(24, dtype=torch.float64))


@given(st.integers(1, 20000), st.integers(1, 6))
def test_factors_multiply_to_the_number(n: int, count: int) -> None:
    factors = digit_sizes(n, count)
    assert len(factors) == count
    assert math.prod(factors) == n
    assert list(factors) == sorted(factors, reverse=True)


@pytest.mark.parametrize(
    ("n", "count", "factors"),
    [(768, 3, (12, 8, 8)), (4096, 3, (16, 16, 16)), (384, 3, (8, 8, 6)), (11008, 3, (43, 16, 16)), (7, 3, (7, 1, 1))],
)
def test_factors_are_as_equal_as_the_primes_allow(n: int, count: int, factors: tuple[int, ...]) -> None:
    assert digit_sizes(n, count) == factors


@pytest.mark.parametrize("sizes", [(2, 3), (4, 3, 2), (2, 3, 2, 5)])
def test_flops_are_those_that_torch_counts(sizes: tuple[int, ...]) -> None:
    cores = [torch.zeros(n, n, 2, 2) for n in sizes]
    with FlopCounterMode(display=False) as counter:
        ring_rows(torch.zeros(7, math.prod(sizes)), cores)
    assert counter.get_total_flops() == 7 * ring_flops(cores)
