"""Products with few entries against the dense matrix."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from isotune.linalg.sparse import scattered, sparse_product


@st.composite
def drawn_entries(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, int, int]:
    """Values, rows and columns of more entries than a small m x n matrix has places, at times."""
    m, n, k = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(st.integers(1, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    places = (torch.randint(side, (k,), generator=generator) for side in (m, n))
    return torch.randn(k, generator=generator, dtype=torch.float64), *places, m, n


@given(drawn_entries())
def test_entries_at_one_place_add_up_in_the_matrix_and_in_its_products(
    entries: tuple[Tensor, Tensor, Tensor, int, int],
) -> None:
    values, rows, cols, m, n = entries
    S = torch.zeros(m, n, dtype=torch.float64)
    for value, row, col in zip(values, rows, cols, strict=True):
        S[row, col] += value
    torch.testing.assert_close(scattered(values, rows, cols, (m, n)), S)
    x = torch.randn(5, n, dtype=torch.float64)
    torch.testing.assert_close(sparse_product(x, values, rows, cols, m), x @ S.mT)


@given(drawn_entries())
def test_product_is_twice_differentiable(entries: tuple[Tensor, Tensor, Tensor, int, int]) -> None:
    values, rows, cols, m, n = entries
    x = torch.randn(2, n, dtype=torch.float64, requires_grad=True)
    arguments = (x, values.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, v: sparse_product(x, v, rows, cols, m), arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x, v: sparse_product(x, v, rows, cols, m), arguments, fast_mode=True)


def test_only_the_inputs_are_saved_for_backward() -> None:
    saved: list[int] = []
    x, values = torch.randn(50, 8, requires_grad=True), torch.randn(300, requires_grad=True)
    rows, cols = torch.randint(6, (300,)), torch.randint(8, (300,))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        sparse_product(x, values, rows, cols, 6).sum()
    assert sorted(saved) == [300, 300, 300, 400]
