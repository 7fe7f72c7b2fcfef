"""The largest singular directions."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from isotune.linalg.triplets import principal_directions, row_signs


@given(st.integers(2, 9), st.integers(2, 9), st.integers(1, 9), st.integers(0, 99))
def test_directions_are_the_best_approximation_of_their_rank(n_out: int, n_in: int, r: int, seed: int) -> None:
    r = min(r, n_in, n_out)
    W = torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    U, S, Vh = principal_directions(W, r)
    rest = torch.linalg.svdvals(W - U * S @ Vh)
    torch.testing.assert_close(rest[: len(rest) - r], torch.linalg.svdvals(W)[r:])
    assert rest[len(rest) - r :].max() < 1e-12
    torch.testing.assert_close(Vh @ Vh.mT, torch.eye(r, dtype=W.dtype))


def test_randomised_form_comes_near_repeats_and_leaves_the_generator_alone() -> None:
    W = torch.randn(40, 30) @ torch.diag(0.7 ** torch.arange(30.0)) @ torch.linalg.qr(torch.randn(30, 30))[0]
    state = torch.get_rng_state()
    first, again, other = (principal_directions(W, 4, 6, seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    torch.testing.assert_close(first[1], principal_directions(W, 4)[1], rtol=1e-3, atol=1e-3)


def test_signs_make_the_largest_entry_of_a_row_positive() -> None:
    A = torch.tensor([[1.0, -3.0, 2.0], [0.5, 0.1, -0.2], [0.0, 0.0, 0.0]])
    assert row_signs(A).tolist() == [-1, 1, 1]
