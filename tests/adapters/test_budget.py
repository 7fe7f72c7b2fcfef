"""Sizing a method to a number of trainable parameters."""

from __future__ import annotations

import pytest
from torch import nn

from isotune import HRA, LoRA, Settings
from isotune.adapters.budget import nearest_to, total_parameters
from isotune.sites import require_site
from laws.test_toy_method import Gain

SIZES = {"one": (384, 384), "two": (384, 96)}
SITES = {path: require_site(nn.Linear(*size, device="meta"), path) for path, size in SIZES.items()}


@pytest.mark.parametrize(
    ("settings", "budget", "rank"),
    [
        (HRA(), 6144, 8),  # 768 a rank
        (HRA(), 5400, 8),  # 7.03: odd ranks cannot start as the identity, and 8 is nearer than 6
        (HRA(start="anchored"), 5400, 7),
        (LoRA(), 6144, 5),  # 1248 a rank
        (LoRA(alpha=3), 1, 1),
        (HRA(), 10**9, 384),
    ],
)
def test_the_rank_nearest_to_the_budget_is_found(settings: Settings, budget: int, rank: int) -> None:
    found = nearest_to(budget, settings, SITES)
    assert found == type(settings)(**{**settings.model_dump(exclude_unset=True), "rank": rank})


def test_a_rank_that_does_not_fit_every_layer_is_passed_over() -> None:
    assert nearest_to(10**9, LoRA(), SITES) == LoRA(rank=96)
    assert total_parameters(LoRA(rank=96), SITES) == 96 * 1248


def test_a_method_without_a_size_stays_as_it_is() -> None:
    assert nearest_to(10, Gain(), SITES) == Gain()
