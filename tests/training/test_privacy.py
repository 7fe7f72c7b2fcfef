"""The accountant: above what is exactly true, and not far above."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch

from isotune.training.privacy import epsilon, renyi


@pytest.mark.parametrize(("noise", "rate"), [(1.0, 0.1), (2.0, 0.5), (0.8, 0.01), (3.0, 1.0)])
@pytest.mark.parametrize("order", [2, 3, 7])
def test_divergence_of_a_step_is_the_integral_of_its_definition(order: int, noise: float, rate: float) -> None:
    z = torch.linspace(-40, 60, 400_001, dtype=torch.float64)
    without = -(z**2) / (2 * noise**2)
    mixed = torch.logaddexp(
        without + (math.log1p(-rate) if rate < 1 else -math.inf), math.log(rate) - (z - 1) ** 2 / (2 * noise**2)
    )
    scale = 1 / (noise * math.sqrt(2 * math.pi))
    forward, backward = (
        math.log(float(torch.trapezoid(scale * (order * p - (order - 1) * q).exp(), z))) / (order - 1)
        for p, q in ((mixed, without), (without, mixed))
    )
    assert renyi(order, noise, rate) == pytest.approx(forward, rel=1e-6, abs=1e-12)
    # Whether an example was added or taken away: the worse of the two is what counts.
    assert backward <= forward + 1e-12


@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (5.0, 10), (20.0, 100), (2.0, 50)])
def test_epsilon_without_sampling_is_just_above_that_of_the_gaussian_mechanism(noise: float, steps: int) -> None:
    mu, delta, cdf = math.sqrt(steps) / noise, 1e-5, NormalDist().cdf
    exact, above = 0.0, 100.0
    for _ in range(60):
        e = (exact + above) / 2
        # Its exact profile: Balle and Wang, ICML 2018, arXiv 1805.06530.
        if cdf(mu / 2 - e / mu) - math.exp(e) * cdf(-mu / 2 - e / mu) > delta:
            exact = e
        else:
            above = e
    assert exact <= epsilon(noise, 1.0, steps, delta) <= 1.15 * exact + 0.05


def test_epsilon_falls_with_noise_and_grows_with_steps_and_rate() -> None:
    base = epsilon(1.0, 0.01, 1000, 1e-5)
    assert 1 < base < 3
    assert epsilon(2.0, 0.01, 1000, 1e-5) < base < epsilon(1.0, 0.01, 4000, 1e-5)
    assert base < epsilon(1.0, 0.02, 1000, 1e-5) < epsilon(1.0, 1.0, 1000, 1e-5)
    assert base < epsilon(1.0, 0.01, 1000, 1e-7)
    assert epsilon(1.0, 0.01, 0, 1e-5) == 0
    assert epsilon(0.0, 0.01, 1, 1e-5) == math.inf


def test_choosing_clients_by_the_round_is_no_sampling_of_single_steps() -> None:
    # The authors' code of FedSVD counts every round's steps at a rate times the share of clients in a round. But a
    # client takes all the steps of a round or none, and the server knows which: at a promised epsilon of 6 (MNLI
    # over six clients, half of them in each of 100 rounds of ten steps) the steps taken cost 9.2.
    rate, noise = 1 / 512, 0.4534
    assert epsilon(noise, rate / 2, 1000, 1e-5) == pytest.approx(6, rel=0.01)
    assert epsilon(noise, rate, 500, 1e-5) == pytest.approx(9.2, rel=0.01)
