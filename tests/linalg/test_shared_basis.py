"""A few basis vectors for several vectors, and several factored matrices in one gauge."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from isotune.linalg.factor_stack import FactorStack, aligned, balanced, squares, stacked
from isotune.linalg.low_rank import Factored
from isotune.linalg.shared_basis import shared_basis


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize(("d", "count"), [(4, 7), (6, 3), (5, 5)])
def test_as_many_basis_vectors_as_the_smaller_side_are_exact(d: int, count: int) -> None:
    X = drawn(9, d, count)
    assert (shared_basis(X).first(min(d, count)).vectors() - X).abs().max() < 1e-12
    centred = shared_basis(X, center=True)
    assert (centred.first(min(d, count) + 1).vectors() - X).abs().max() < 1e-12


@pytest.mark.parametrize("center", [False, True])
def test_what_is_left_is_the_tail_of_the_singular_values_and_shrinks(center: bool) -> None:
    X = drawn(9, 4, 7)
    basis = shared_basis(X, center)
    around = X - X.mean(dim=2, keepdim=True) if center else X
    S = torch.linalg.svdvals(around)
    for size in range(1, 4):
        measured = (basis.first(size).vectors() - X).square().sum((0, 1))
        torch.testing.assert_close(measured, basis.left(size))
        torch.testing.assert_close(measured.sum(), S[:, size - center :].square().sum())
        assert basis.left(size + 1).sum() < basis.left(size).sum()
        assert basis.first(size).size == size


def test_no_other_basis_leaves_less() -> None:
    X = drawn(5, 4, 6)
    left = float(shared_basis(X).left(2).sum())
    for _ in range(20):
        Q, _ = torch.linalg.qr(drawn(5, 4, 2))
        assert float((X - Q @ (Q.mT @ X)).square().sum()) > left


def test_single_vectors_come_out_alone() -> None:
    basis = shared_basis(drawn(5, 4, 6), center=True).first(3)
    torch.testing.assert_close(basis.vectors(slice(2, 3)), basis.vectors()[:, :, 2:3])


def matrices(*ranks: int, m: int = 12, n: int = 9) -> list[Factored]:
    return [Factored(drawn(m, r), drawn(r, n)) for r in ranks]


def assert_holds(stack: FactorStack, expected: list[Factored]) -> None:
    for B, A, matrix in zip(stack.B, stack.A, expected, strict=True):
        torch.testing.assert_close(B @ A, matrix.dense())


def test_every_gauge_holds_the_same_matrices() -> None:
    given = matrices(3, 1, 2)
    for stack in (stacked(given), balanced(stacked(given)), aligned(balanced(stacked(given)))):
        assert stack.rank == 3
        assert stack.ranks == [3, 1, 2]
        assert_holds(stack, given)
        torch.testing.assert_close(squares(stack.B, stack.A), torch.stack([m.dense().square().sum() for m in given]))
        for B, back, rank in zip(stack.B, stack.back, stack.ranks, strict=True):
            torch.testing.assert_close(back @ back.mT, torch.eye(3, dtype=torch.float64))
            assert (B @ back.mT)[:, rank:].abs().sum() < 1e-12


def test_balanced_factors_share_the_singular_values_and_drop_what_is_none() -> None:
    one, other = matrices(2, 3)
    wide = Factored(torch.cat([one.B, one.B], dim=1), torch.cat([one.A, one.A]))  # rank 2 in 4 columns
    stack = balanced(stacked([wide, other]))
    assert stack.ranks == [2, 3]
    assert stack.rank == 3
    S = torch.linalg.svdvals(wide.dense())[:3] * torch.tensor([1, 1, 0])
    torch.testing.assert_close(stack.B[0].mT @ stack.B[0], torch.diag(S))
    torch.testing.assert_close(stack.A[0] @ stack.A[0].mT, torch.diag(S))


def test_ranks_above_the_smaller_side_and_zeros_are_no_trouble() -> None:
    given = [Factored(drawn(3, 8), drawn(8, 5)), Factored(torch.zeros(3, 2).double(), drawn(2, 5))]
    stack = aligned(balanced(stacked(given)))
    assert stack.ranks == [3, 0]
    assert_holds(stack, given)
    nothing = aligned(balanced(stacked([given[1], given[1]])))
    assert nothing.B.shape == (2, 3, 0)


def test_alignment_undoes_any_gauge() -> None:
    (one,) = matrices(3)
    turns = [torch.eye(3).double(), torch.linalg.qr(drawn(3, 3))[0], drawn(3, 3)]
    stack = aligned(balanced(stacked([Factored(one.B @ G, torch.linalg.inv(G) @ one.A) for G in turns])))
    for i in (1, 2):
        torch.testing.assert_close(stack.B[i], stack.B[0])
        torch.testing.assert_close(stack.A[i], stack.A[0])


def test_alignment_brings_factors_nearer_to_each_other() -> None:
    before = balanced(stacked(matrices(3, 3, 3)))
    after = aligned(before)
    assert spread(after) < spread(before)
    largest = int(before.B.square().sum((1, 2)).argmax())
    for _ in range(20):
        G = torch.linalg.qr(drawn(3, 3, 3))[0]
        G[largest] = torch.eye(3)
        assert spread(after) < spread(FactorStack(before.B @ G, G.mT @ before.A, before.ranks, before.back))


def spread(stack: FactorStack) -> float:
    return float((stack.B - stack.B.mean(0)).square().sum() + (stack.A - stack.A.mean(0)).square().sum())
