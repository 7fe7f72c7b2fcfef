"""The projection by signs and Walsh's and Hadamard's matrix, against matrices that are written out."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from torch import Tensor

from isotune.linalg.sign_projection import project, random_signs, walsh_hadamard


def signs(n: int, D: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    return random_signs(n, D, torch.Generator().manual_seed(seed))


@cache
def hadamard(m: int) -> Tensor:
    """H (m, m) by its definition: in the place i, j stands the parity of the bits that i and j have in common."""
    return 1 - 2 * torch.tensor([[(i & j).bit_count() % 2 for j in range(m)] for i in range(m)]).double()


def written_out(S: Tensor, T: Tensor, D: int) -> Tensor:
    """P (n, D)."""
    rows = torch.cat([hadamard(S.shape[1]) * signs for signs in S])[: len(T), :D]
    return T[:, None] * rows / math.sqrt(len(T))


@pytest.mark.parametrize(("n", "D"), [(48, 5), (48, 16), (7, 12), (1, 1), (64, 1)])
def test_it_and_its_gradient_are_those_of_the_matrix(n: int, D: int) -> None:
    S, T = signs(n, D)
    P = written_out(S, T, D)
    draw = torch.Generator().manual_seed(1)
    z = torch.randn(D, dtype=torch.float64, generator=draw).requires_grad_()
    g = torch.randn(n, dtype=torch.float64, generator=draw)
    y = project(z, S, T) / math.sqrt(n)
    torch.testing.assert_close(y, P @ z)
    (gradient,) = torch.autograd.grad(y, z, g)
    torch.testing.assert_close(gradient, P.mT @ g)


def test_the_transform_is_its_own_inverse_but_for_m() -> None:
    x = torch.randn(3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(walsh_hadamard(walsh_hadamard(x)), 32 * x)


@pytest.mark.parametrize(("n", "D"), [(48, 5), (7, 12), (33, 8)])
def test_columns_have_length_one_for_every_size(n: int, D: int) -> None:
    P = written_out(*signs(n, D), D)
    torch.testing.assert_close(P.square().sum(0), torch.ones(D, dtype=torch.float64))


def test_columns_are_orthogonal_where_blocks_are_whole() -> None:
    P = written_out(*signs(48, 5), 5)
    torch.testing.assert_close(P.mT @ P, torch.eye(5, dtype=torch.float64))


def test_columns_are_orthogonal_in_expectation_else() -> None:
    draws = [written_out(*signs(3, 4, seed), 4) for seed in range(2000)]
    mean = torch.stack([P.mT @ P for P in draws]).mean(0)
    # The mean of 2000 numbers in [-1, 1] is within 5 / √2000 of its expectation, but for one time in two million.
    assert (mean - torch.eye(4)).abs().max() < 5 / math.sqrt(2000)


def test_no_direction_is_seen_more_than_another() -> None:
    # Such as the constant one, which Hadamard's first column alone would see.
    for direction in (torch.ones(16), torch.eye(16)[3], torch.tensor([1.0, -1.0]).repeat(8)):
        seen = [
            float((written_out(*signs(16, 3, seed), 3).mT @ direction.double()).square().sum())
            for seed in range(2000)
        ]
        mean = sum(seen) / len(seen)
        assert mean == pytest.approx(3 / 16 * float(direction.square().sum()), rel=0.15)


def test_seeds_decide() -> None:
    first, again, other = signs(40, 6, 1), signs(40, 6, 1), signs(40, 6, 2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[1], other[1])
