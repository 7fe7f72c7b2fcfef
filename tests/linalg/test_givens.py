"""Products of plane transformations: equal to one dense d x d matrix after another."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from isotune.linalg.givens import givens_product, givens_rotations


def dense(G: Tensor, d: int) -> Tensor:
    """R, plane by plane."""
    R, planes, stride = torch.eye(d, dtype=G.dtype), iter(G), 1
    while stride < d:
        for i in range(0, d - stride, 2 * stride):
            P = torch.eye(d, dtype=G.dtype)
            P[[i, i, i + stride, i + stride], [i, i + stride, i, i + stride]] = next(planes).flatten()
            R = R @ P
        stride *= 2
    assert next(planes, None) is None
    return R


@pytest.mark.parametrize("rotations", [True, False])
@given(st.integers(1, 21), st.integers(0, 99))
def test_product_and_its_transpose_are_the_dense_ones_at_any_size(rotations: bool, d: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    G = torch.randn(d - 1, 2, 2, generator=generator, dtype=torch.float64)
    G = givens_rotations(3 * G[:, 0, 0]) if rotations else G
    v = torch.randn(2, 3, d, generator=generator, dtype=torch.float64)
    R = dense(G, d)
    torch.testing.assert_close(givens_product(v, G), v @ R)
    torch.testing.assert_close(givens_product(v, G, transpose=True), v @ R.mT)
    if rotations:
        torch.testing.assert_close(R @ R.mT, torch.eye(d, dtype=R.dtype))
        torch.testing.assert_close(torch.linalg.det(R), torch.ones((), dtype=R.dtype))


@given(st.integers(2, 9), st.integers(0, 99))
def test_any_vector_can_be_turned_onto_the_first_axis(d: int, seed: int) -> None:
    v = torch.randn(d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    angles, left = [], v
    while len(left) > 1:
        a, b = left[0::2][: len(left) // 2], left[1::2]
        angles.append(torch.atan2(b, a))
        left = torch.cat([torch.hypot(a, b), left[2 * len(b) :]])
    turned = givens_product(v, givens_rotations(torch.cat(angles)))
    expected = torch.zeros_like(v)
    expected[0] = v.norm()
    torch.testing.assert_close(turned, expected, rtol=0, atol=1e-12)


def test_rotation_by_a_right_angle() -> None:
    G = givens_rotations(torch.tensor([math.pi / 2], dtype=torch.float64))
    v = torch.tensor([[2.0, 5.0]], dtype=torch.float64)
    torch.testing.assert_close(givens_product(v, G, transpose=True), torch.tensor([[-5.0, 2.0]], dtype=torch.float64))


def test_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(1)
    v = torch.randn(2, 7, dtype=torch.float64, requires_grad=True)
    G = torch.randn(6, 2, 2, dtype=torch.float64, requires_grad=True)
    for transpose in (False, True):
        assert torch.autograd.gradcheck(lambda v, G, t=transpose: givens_product(v, G, t), (v, G))
