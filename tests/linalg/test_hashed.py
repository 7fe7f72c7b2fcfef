"""Random numbers from a hash: their bits are fixed for good, and they are what they are said to be."""

from __future__ import annotations

import pytest
import torch

from isotune.linalg.hashed import normal, permutation, signs


def test_bits_are_those_of_the_first_version() -> None:
    assert permutation(8, ("a", 1)).tolist() == [5, 1, 6, 2, 7, 3, 4, 0]
    assert signs(12, ("a", 1)).tolist() == [-1, 1, 1, 1, 1, -1, -1, 1, -1, -1, 1, 1]
    assert normal((1, 3), ("a", 1)).flatten().tolist() == pytest.approx(
        [-0.9159855010409939, -0.5960088946032123, 2.680317297562917], abs=1e-12
    )


def test_keys_decide_and_a_number_is_not_its_text() -> None:
    draws = [permutation(50, key).tolist() for key in (("a", 1), ("a", 2), ("b", 1), ("a", "1"), ("a1",))]
    assert all(sorted(draw) == list(range(50)) for draw in draws)
    assert len({tuple(draw) for draw in draws}) == 5


def test_positions_signs_and_entries_are_distributed_as_said() -> None:
    first = torch.stack([permutation(4, ("p", i))[0] for i in range(2000)]).bincount()
    assert (first - 500).abs().max() < 100
    assert abs(float(signs(10_000, ("s",)).mean())) < 0.05
    z = normal((100, 200), ("z",))
    assert abs(float(z.mean())) < 0.03
    assert float(z.std()) == pytest.approx(1, abs=0.02)
    assert float((z.abs() < 1).double().mean()) == pytest.approx(0.6827, abs=0.02)
