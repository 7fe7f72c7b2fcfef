"""What is carried over from a narrow model to a wide one, and the figure that says whether it fits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from isotune.optim import scaled_parameter_groups, top_singular_values


class Tied(nn.Module):
    """An embedding that is also the head, two matrices, a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embedding.weight


def by_name(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The group of each parameter."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = [names[id(p)] for group in groups for p in group["params"]]
    assert len(set(found)) == len(found) == len(names)
    return {names[id(p)]: group for group in groups for p in group["params"]}


def test_matrices_get_the_scaled_and_all_else_the_plain_rate() -> None:
    with torch.device("meta"):
        base = Tied(8)
    wide = Tied(32)
    found = by_name(wide, scaled_parameter_groups(wide, base, lr=0.1, weight_decay=0.2, vector_lr=0.3))
    for name, group in found.items():
        matrix = name in ("up.weight", "down.weight")
        assert group["lr"] == pytest.approx(0.1 / 4 if matrix else 0.3), name
        assert group["weight_decay"] == pytest.approx(0.2 * 2 if matrix else 0.0), name
    constant = by_name(wide, scaled_parameter_groups(wide, base, 0.1, 0.2, wd_exponent=1.0))
    assert constant["up.weight"]["lr"] * constant["up.weight"]["weight_decay"] == pytest.approx(0.1 * 0.2)


def test_at_its_own_width_a_model_gets_what_was_tuned() -> None:
    model = Tied(8)
    found = by_name(model, scaled_parameter_groups(model, Tied(8), lr=0.1, weight_decay=0.2))
    assert all(group["lr"] == 0.1 for group in found.values())
    assert found["up.weight"]["weight_decay"] == 0.2
    assert found["norm.weight"]["weight_decay"] == found["up.bias"]["weight_decay"] == 0.0


def test_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the narrow model has no 'embedding\.weight' of 2 dimensions"):
        scaled_parameter_groups(Tied(8), nn.LayerNorm(8), lr=0.1, weight_decay=0.2)


def test_in_pure_noise_adamw_settles_where_the_rule_begins() -> None:
    generator = torch.Generator().manual_seed(0)
    W, lr, decay = nn.Parameter(torch.zeros(64, 64)), 0.05, 0.2
    optimizer = torch.optim.AdamW([W], lr=lr, weight_decay=decay, betas=(0.0, 0.99), eps=1e-12)
    for _ in range(500):
        W.grad = torch.randn(64, 64, generator=generator)
        optimizer.step()
    assert float(W.detach().square().mean().sqrt()) == pytest.approx(math.sqrt(lr / (2 * decay)), rel=0.1)


def test_the_largest_singular_values() -> None:
    model = nn.Sequential(nn.Linear(6, 9), nn.Conv2d(2, 3, 3))
    found = top_singular_values(model, steps=500)
    assert found.keys() == {"0.weight", "1.weight"}
    for name, value in found.items():
        expected = float(torch.linalg.matrix_norm(model.get_parameter(name).detach().flatten(1), 2))
        assert value == pytest.approx(expected, rel=1e-3)
