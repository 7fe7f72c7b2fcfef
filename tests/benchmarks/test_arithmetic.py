"""What the benchmarks count and fit is right on cases whose answer is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.growth import exponent, paired
from benchmarks.saved import saved_bytes
from benchmarks.timing import Effort, alternate, spread


def test_saved_bytes_of_a_frozen_linear_are_its_weight() -> None:
    layer = nn.Linear(64, 32).requires_grad_(False)
    x = torch.randn(8, 64, requires_grad=True)
    assert saved_bytes(layer, lambda: layer(x)) == {"saved": 4 * 64 * 32, "saved_without_frozen": 0}


def test_saved_bytes_of_a_trained_linear_are_its_weight_and_its_input() -> None:
    layer = nn.Linear(64, 32)
    x = torch.randn(8, 64, requires_grad=True)
    both = 4 * (64 * 32 + 8 * 64)
    assert saved_bytes(layer, lambda: layer(x)) == {"saved": both, "saved_without_frozen": both}


def test_a_storage_saved_twice_counts_once() -> None:
    x = torch.randn(100, requires_grad=True)
    assert saved_bytes(nn.Identity(), lambda: x * x.reshape(100))["saved"] == 400


def test_nothing_is_saved_without_a_graph() -> None:
    layer = nn.Linear(4, 4).requires_grad_(False)
    assert saved_bytes(layer, lambda: layer(torch.randn(2, 4)))["saved"] == 0


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_law_is_found(power: float) -> None:
    assert exponent([(x, 3e-4 * x**power) for x in (64, 128, 256)]) == pytest.approx(power)


def test_a_point_lost_in_noise_is_left_out_of_the_fit() -> None:
    assert exponent([(1, -0.1), (2, 4.0), (4, 8.0)]) == pytest.approx(1.0)
    assert exponent([(1, -0.1), (2, 4.0)]) is None


def test_paired_differences_cancel_a_drift() -> None:
    assert paired([11.0, 21.0, 31.0], [10.0, 20.0, 30.0]) == 1.0


def test_contenders_take_turns_in_alternating_order() -> None:
    seen: list[str] = []

    def step(name: str) -> dict[str, float]:
        seen.append(name)
        return {"total": 1.0}

    samples = alternate({"a": lambda: step("a"), "b": lambda: step("b")}, Effort(seconds=0, least=4, most=4))
    assert "".join(seen[2:]) == "abbaabba"  # after a warm-up call each
    assert {name: s.phases["total"] for name, s in samples.items()} == {"a": [1.0] * 4, "b": [1.0] * 4}


def test_a_slow_contender_stops_early_and_a_fast_one_is_sampled_in_bulk() -> None:
    effort = Effort(seconds=0.0, least=2, most=9, sample=1.0)
    samples = alternate({"slow": lambda: {"total": 5.0}, "fast": lambda: {"total": 0.1}}, effort)
    assert len(samples["slow"].phases["total"]) == 2
    assert (samples["slow"].calls, samples["fast"].calls) == (1, 10)


def test_the_spread_of_known_values() -> None:
    expected = {"min": 1.0, "q1": 2.0, "median": 3.0, "q3": 4.0, "repetitions": 5}
    assert spread([5.0, 1.0, 3.0, 2.0, 4.0]) == expected
    assert spread([2.0])["q3"] == 2.0


def test_figures_keep_four_digits(tmp_path: Path) -> None:
    from benchmarks.__main__ import write

    write(tmp_path / "x.json", {"a": [1.23456789, 3], "b": {"c": None}})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": [1.235, 3], "b": {"c": None}}
