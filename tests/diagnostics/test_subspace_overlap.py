"""Subspace overlap between changes, and what the sizes of a change are."""

from __future__ import annotations

import pytest
import torch

from isotune.diagnostics import effective_rank, subspace_overlap
from isotune.diagnostics.overlap import directions
from isotune.linalg.low_rank import Factored


def basis(m: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.linalg.qr(torch.randn(m, m))[0], torch.linalg.qr(torch.randn(n, n))[0]


def of(U: torch.Tensor, V: torch.Tensor) -> Factored:
    """A change with these column and row spaces, in some gauge."""
    G = torch.randn(U.shape[1], U.shape[1])
    return Factored(U @ G, torch.randn(U.shape[1], U.shape[1]) @ V.mT)


def test_a_change_overlaps_with_itself_and_any_multiple() -> None:
    change = Factored(torch.randn(20, 3), torch.randn(3, 14))
    found = subspace_overlap(directions(change, 10), directions(change.scaled(-3), 10))
    assert found is not None
    assert found.columns == pytest.approx(1, abs=1e-5)
    assert found.rows == pytest.approx(1, abs=1e-5)
    assert len(found.column_cosines) == 3


def test_columns_and_rows_are_told_apart() -> None:
    U, V = basis(20, 14)
    one, other = of(U[:, :4], V[:, :4]), of(U[:, 2:6], V[:, 8:12])
    found = subspace_overlap(directions(one, 10), directions(other, 10))
    assert found is not None
    assert found.columns == pytest.approx(0.5, abs=1e-4)
    assert found.rows == pytest.approx(0, abs=1e-4)
    assert found.column_cosines == pytest.approx([1, 1, 0, 0], abs=1e-3)
    assert found.column_chance == 4 / 20
    assert found.row_chance == 4 / 14


def test_a_space_within_a_larger_one_overlaps_in_full() -> None:
    U, V = basis(20, 14)
    found = subspace_overlap(directions(of(U[:, :2], V[:, :2]), 10), directions(of(U[:, :5], V[:, :5]), 10))
    assert found is not None
    assert found.columns == pytest.approx(1, abs=1e-5)


def test_spaces_at_random_overlap_by_chance() -> None:
    found = [
        subspace_overlap(*(directions(Factored(torch.randn(100, 4), torch.randn(4, 80)), 10) for _ in range(2)))
        for _ in range(40)
    ]
    mean = sum(own.columns for own in found if own) / len(found)
    assert mean == pytest.approx(0.04, rel=0.25)
    assert found[0] is not None
    assert found[0].column_chance == 0.04


def test_a_dense_change_is_compared_by_its_leading_directions() -> None:
    U, V = basis(60, 50)
    values = torch.tensor([9.0, 8.0, 7.0, *([0.01] * 40)])
    dense = U[:, :43] * values @ V[:, :43].mT
    factored = of(U[:, :3], V[:, :3])
    found = subspace_overlap(directions(dense, 3), directions(factored, 3))
    assert found is not None
    assert found.columns == pytest.approx(1, abs=1e-4)


def test_changes_of_different_shapes_and_of_nothing_have_no_overlap() -> None:
    assert subspace_overlap(directions(torch.randn(9, 7), 5), directions(torch.randn(9, 6), 5)) is None
    nothing = directions(Factored(torch.zeros(9, 2), torch.ones(2, 7)), 5)
    assert subspace_overlap(nothing, directions(torch.randn(9, 7), 5)) is None


def test_effective_rank_counts_equal_directions_and_discounts_small_ones() -> None:
    assert effective_rank(torch.ones(5)) == pytest.approx(5)
    assert effective_rank(torch.tensor([3.0, 0.0, 0.0])) == pytest.approx(1)
    assert 1 < effective_rank(torch.tensor([1.0, 0.1, 0.1])) < 2.2
    assert effective_rank(torch.zeros(3)) == 0
    assert effective_rank(torch.zeros(0)) == 0
