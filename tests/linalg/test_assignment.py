"""The linear assignment problem."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isotune.linalg.assignment import assignment


def total(gain: torch.Tensor, order: torch.Tensor) -> float:
    return float(gain[torch.arange(len(gain)), order].sum())


@given(st.integers(1, 6), st.integers(0, 99), st.booleans())
def test_no_permutation_has_a_larger_sum(n: int, seed: int, ties: bool) -> None:
    gain = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if ties:
        gain = gain.round()
    best = max(total(gain, torch.tensor(order)) for order in itertools.permutations(range(n)))
    order = assignment(gain)
    assert sorted(order.tolist()) == list(range(n))
    assert abs(total(gain, order) - best) < 1e-12


def test_agrees_with_scipy_on_larger_matrices() -> None:
    scipy = pytest.importorskip("scipy.optimize")
    for n, kind in ((60, "normal"), (150, "normal"), (90, "one column for all")):
        gain = torch.randn(n, n, dtype=torch.float64)
        if kind != "normal":
            gain[:, 3] += 50
        rows, columns = scipy.linear_sum_assignment(gain.numpy(), maximize=True)
        assert abs(total(gain, assignment(gain)) - float(gain[rows, columns].sum())) < 1e-9


def test_a_hidden_permutation_is_found() -> None:
    order = torch.randperm(200)
    X = torch.randn(200, 64)
    Y = X[order] + 0.1 * torch.randn(200, 64)
    assert assignment(Y @ X.mT).equal(order)


def test_nothing_to_assign() -> None:
    assert assignment(torch.empty(0, 0)).shape == (0,)
