"""Spectral variation: what moves the values, what moves the vectors, and what moves neither."""

from __future__ import annotations

import pytest
import torch

from isotune.diagnostics import spectral_variation
from isotune.linalg.low_rank import Factored, dense_svd


def weight(values: list[float], m: int = 20, n: int = 16) -> torch.Tensor:
    """A matrix with these singular values."""
    U, V = (torch.linalg.qr(torch.randn(size, len(values), dtype=torch.float64))[0] for size in (m, n))
    return U * torch.tensor(values, dtype=torch.float64) @ V.mT


def rotation(d: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0]


APART = [9.0, 7.0, 5.0, 4.0, 3.0, 2.0, 1.0]


@pytest.mark.parametrize("k", [1, 3, 7, 50])
def test_no_change_is_no_variation(k: int) -> None:
    W = weight(APART)
    for change in (torch.zeros_like(W), Factored(W.new_zeros(20, 1), W.new_ones(1, 16))):
        found = spectral_variation(W, change, k)
        assert max(found.values, found.relative) < 1e-12
        assert max(found.vectors, found.matched, found.distance) < 1e-7


def test_scaling_moves_the_values_alone() -> None:
    W = weight(APART)
    found = spectral_variation(W, 2 * W, 4)  # W' = 3 W
    assert found.values == pytest.approx(2 * sum(APART[:4]) / 4)
    assert found.relative == pytest.approx(2)
    assert max(found.vectors, found.matched, found.distance) < 1e-7


def test_a_change_of_sign_of_the_vectors_is_none() -> None:
    W = weight(APART)
    assert spectral_variation(W, -2 * W, 4).vectors < 1e-7  # W' = -W


def test_a_rotation_moves_the_vectors_alone() -> None:
    W = weight(APART)
    found = spectral_variation(W, rotation(20) @ W - W, 7)
    assert found.values < 1e-9
    # The right vectors stay, so that half of it is left out of all.
    assert 0.2 < found.vectors <= 0.5
    assert 0 < found.distance <= 0.5


def test_it_is_the_papers_formula_over_the_leading_triplets() -> None:
    W, change = weight(APART), 0.3 * torch.randn(20, 16, dtype=torch.float64)
    old, new = dense_svd(W), dense_svd(W + change)
    for k in (3, 6):
        found = spectral_variation(W, change, k)
        u = torch.stack([(old.U[:, i] @ new.U[:, i]).abs() for i in range(k)])
        v = torch.stack([(old.V[:, i] @ new.V[:, i]).abs() for i in range(k)])
        assert found.values == pytest.approx(float((new.S[:k] - old.S[:k]).abs().mean()))
        assert found.vectors == pytest.approx(float(1 - (u + v).mean() / 2))
        assert 0 <= found.matched <= found.vectors <= 1
        assert 0 <= found.distance <= 1


def test_two_values_that_change_places_are_matched_and_move_no_space() -> None:
    U, V = rotation(12)[:, :3], rotation(10)[:, :3]
    before, after = torch.tensor([5.0, 4.99, 1.0]).double(), torch.tensor([4.99, 5.0, 1.0]).double()
    found = spectral_variation(U * before @ V.mT, U * (after - before) @ V.mT, 3)
    assert found.vectors == pytest.approx(2 / 3)
    assert found.matched < 1e-7
    assert found.distance < 1e-7


def test_an_orthogonal_space_is_at_distance_one() -> None:
    U, V = rotation(12), rotation(10)
    W, other = U[:, :4] @ V[:, :4].mT, 3 * U[:, 4:8] @ V[:, 4:8].mT
    found = spectral_variation(W, other - W, 4)
    assert found.distance == pytest.approx(1)
    assert found.vectors == pytest.approx(1)
    assert found.matched == pytest.approx(1)
