"""Quantiles of magnitudes, by a histogram and exactly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from isotune.merging.rules.families.magnitudes import Histogram, band, largest, thresholds
from merging.drawn import factored, site, tensors


@pytest.mark.parametrize("density", [0.001, 0.05, 0.2, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("power", [1, 7])
def test_the_histogram_keeps_the_share_asked_for(density: float, power: int) -> None:
    # To the seventh power the magnitudes range over thirty orders.
    (x,) = tensors(1, 300, 500, dtype=torch.float32)
    x = x**power
    threshold = Histogram().add(x[:100]).add(x[100:]).threshold(density)
    share = float((x.abs() >= threshold).double().mean())
    assert share == pytest.approx(density, abs=1e-4)


@given(st.integers(0, 999), st.integers(1, 40), st.integers(1, 40), st.sampled_from([torch.float32, torch.float64]))
def test_places_are_exact(seed: int, m: int, n: int, dtype: torch.dtype) -> None:
    (x,) = tensors(1, m, n, seed=seed, dtype=dtype)
    x[x.abs() < 0.2] = 0
    # Equal in fp32, not in float64.
    x[0] = 1 + 1e-9 * x[0]
    ordered = x.abs().flatten().sort(descending=True).values
    places = [1, (m * n + 1) // 2, m * n]
    assert largest(x, places) == [float(ordered[place - 1]) for place in places]


def test_places_of_factored_changes_are_those_of_their_product() -> None:
    (change,) = factored(1, 20, 30, 2)
    assert largest(change, [1, 77]) == pytest.approx(largest(change.dense(), [1, 77]))


def test_bands_hold_both_ends() -> None:
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([-3.0, 0.1, 0.5, -0.5, 2.0, 0.0, -2.0], dtype=dtype)
        low = float(x[1])
        torch.testing.assert_close(band(low)(x), x)
        torch.testing.assert_close(band(0.5)(x), x.where(x.abs() >= 0.5, 0))
        torch.testing.assert_close(band(0.5, 2.0)(x), x.where((x.abs() >= 0.5) & (x.abs() <= 2), 0))
        torch.testing.assert_close(band(0.0)(x), x)


def test_weights_that_a_model_left_alone_do_not_count() -> None:
    a, b = tensors(2, 30, 30)
    found = thresholds([site([a, b], path="a"), site([b, 0 * b], path="b")], 0.2, "model")
    assert found is not None
    assert found["t"] == Histogram().add(b).threshold(0.2)
    assert found["s"] == Histogram().add(a).add(b).threshold(0.2)
    assert thresholds([site([0 * a])], 0.2, "model") == {"s": 0.0}
    assert thresholds([site([a])], 0.2, "tensor") is None
    assert thresholds([site([a])], 1.0, "model") is None
