"""The shared iteration: what it does to singular values, whatever the shape, the size and the precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from slow import newton_schulz

from isotune.optim import orthogonalize

METHODS = ["newton-schulz", "polar-express", "svd"]


@given(m=st.integers(1, 12), n=st.integers(1, 40), batch=st.sampled_from([(), (3,), (2, 2)]), seed=st.integers(0, 99))
def test_it_is_the_slow_iteration_for_every_matrix_of_a_batch(
    m: int, n: int, batch: tuple[int, ...], seed: int
) -> None:
    G = torch.randn(*batch, m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    slow = torch.stack([newton_schulz(one) for one in G.reshape(-1, m, n)]).view(G.shape)
    torch.testing.assert_close(orthogonalize(G), slow, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("method", "low", "high"), [("newton-schulz", 0.68, 1.20), ("polar-express", 0.85, 1.15)])
def test_singular_values_end_near_one_and_vectors_stay(method: Any, low: float, high: float) -> None:
    for m, n in ((8, 8), (8, 64), (64, 8)):
        U, V = (torch.linalg.qr(torch.randn(d, 8, dtype=torch.float64))[0] for d in (m, n))
        S = torch.logspace(0, -2.2, 8, dtype=torch.float64)
        inside = U.mT @ orthogonalize((U * S) @ V.mT, method) @ V
        assert bool(((inside.diagonal() > low) & (inside.diagonal() < high)).all())
        assert float((inside - inside.diagonal().diag()).abs().max()) < 1e-9


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(6, 6), (4, 30), (30, 4)], ids=str)
def test_it_knows_no_length_and_commutes_with_rotations(method: Any, shape: tuple[int, int]) -> None:
    G = torch.randn(shape, dtype=torch.float64)
    Q = torch.linalg.qr(torch.randn(shape[0], shape[0], dtype=torch.float64))[0]
    expected = orthogonalize(G, method)
    for scale in (1e-12, 1e12):
        torch.testing.assert_close(orthogonalize(scale * G, method), expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(orthogonalize(G.mT, method), expected.mT, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(orthogonalize(Q @ G, method), Q @ expected, rtol=1e-7, atol=1e-9)
    assert not orthogonalize(0 * G, method).any()


def test_exactly_it_is_the_polar_factor_and_nothing_where_there_is_no_rank() -> None:
    G = torch.randn(6, 4, dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    torch.testing.assert_close(orthogonalize(G, "svd"), U @ Vh)
    G[:, 3] = G[:, 0]
    torch.testing.assert_close(
        torch.linalg.svdvals(orthogonalize(G, "svd")).round(), torch.tensor([1.0, 1, 1, 0]).double()
    )
    cubic = orthogonalize(torch.randn(6, 4, dtype=torch.float64), steps=60, coefficients=(1.5, -0.5, 0.0))
    torch.testing.assert_close(cubic.mT @ cubic, torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize("method", ["newton-schulz", "polar-express"])
@pytest.mark.parametrize("shape", [(16, 16), (8, 200), (200, 8)], ids=str)
def test_lower_precision_costs_what_its_rounding_does(method: Any, shape: tuple[int, int]) -> None:
    G = torch.randn(shape, dtype=torch.float64)
    exact = orthogonalize(G, method)
    for dtype, within in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        found = orthogonalize(G.float(), method, dtype=dtype)
        assert found.dtype == torch.float32
        assert float((found - exact).norm() / exact.norm()) < within
    kept = torch.randn(8, 40, dtype=torch.bfloat16)
    before = kept.clone()
    assert orthogonalize(kept, method, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(kept, before)


def test_a_skew_symmetric_matrix_stays_one() -> None:
    Q = torch.randn(6, 6, dtype=torch.float64)
    found = orthogonalize(Q - Q.mT)
    assert float((found + found.mT).norm()) < 1e-12 * float(found.norm())


def test_what_is_no_matrix_or_no_method_is_refused() -> None:
    with pytest.raises(ValueError, match="two dimensions, and this has 1"):
        orthogonalize(torch.zeros(3))
    with pytest.raises(ValueError, match="one of newton-schulz, polar-express, svd"):
        orthogonalize(torch.zeros(3, 3), "qr")  # type: ignore[arg-type]
