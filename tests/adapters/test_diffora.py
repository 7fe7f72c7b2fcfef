"""What is particular to DiffoRA: the search for the layers that are worth a LoRA, and what is left after it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import isotune
from support import adapted, assert_same_output, move, output, stories


def chain(**options: Any) -> Any:
    """Three layers with adapters, the first two of them with biases that a planted change of the third needs not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 6))
    return isotune.adapt(model, isotune.method("diffora", rank=2, **options), ["0", "2", "4"], seed=0)


def adapters(model: Any) -> list[Any]:
    return [model[k].isotune["default"] for k in (0, 2, 4)]


def test_the_search_trains_factors_and_theta_in_turn_and_then_the_chosen_layers_alone() -> None:
    model = chain(keep=0.4, search=0.5)
    optimizer = torch.optim.AdamW(isotune.parameter_groups(model, lr=1e-2, weight_decay=0.1))
    x = torch.randn(16, 12)
    trained = []
    for k in range(20):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        trained.append((adapters(model)[0].B.grad is not None, adapters(model)[0].theta.grad is not None))
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        isotune.after_step(model, (k + 1) / 20, optimizer)
        if k == 9:
            assert not any(adapter.B.any() for adapter in adapters(model))
            assert adapters(model)[0].B not in optimizer.state
            theta = [adapter.theta.item() for adapter in adapters(model)]
    assert trained[:3] == [(True, False)] * 3
    assert set(trained[3:10]) == {(True, False), (False, True)}
    assert trained[10:] == [(True, True)] * 10
    assert [adapter.theta.item() for adapter in adapters(model)] == theta
    chosen = [float(adapter.chosen) for adapter in adapters(model)]
    assert sorted(chosen) == [0, 1, 1]
    assert min(t for t, c in zip(theta, chosen, strict=True) if c) >= max(
        t for t, c in zip(theta, chosen, strict=True) if not c
    )
    expected = model(x)
    isotune.compact(model)
    assert_same_output(model(x), expected)
    assert len(isotune.describe(model)) == 2


def test_a_planted_change_of_one_layer_is_found() -> None:
    model = chain(keep=0.1, search=0.8, rate=5.0)
    x = torch.randn(256, 12)
    with torch.no_grad():
        hidden = model[3](model[2](model[1](model[0](x))))
        goal = model[4](hidden) + 2 * (hidden @ torch.randn(12, 2)) @ torch.randn(2, 6)
    optimizer = torch.optim.Adam(isotune.parameter_groups(model, lr=1e-2))
    for k in range(120):
        optimizer.zero_grad()
        rows = torch.arange(256)[k % 2 :: 2]
        (model(x[rows]) - goal[rows]).square().mean().backward()
        optimizer.step()
        isotune.after_step(model, (k + 1) / 120, optimizer)
    assert [float(adapter.chosen) for adapter in adapters(model)] == [0, 0, 1]


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_with_all_layers_chosen_it_is_a_lora_and_with_none_the_base(gamma: float) -> None:
    model = adapted(stories(), isotune.method("diffora", rank=2), ["q_proj"], size=0.0)
    lora = adapted(stories(), isotune.method("lora", rank=2), ["q_proj"], size=0.0)
    move(lora, size=0.3)
    for ours, theirs in zip(model.modules(), lora.modules(), strict=False):
        if hasattr(ours, "isotune") and hasattr(theirs, "isotune"):
            own, other = ours.isotune["default"], theirs.isotune["default"]
            own.A.data.copy_(other.A)
            own.B.data.copy_(other.B)
            own.chosen.fill_(gamma)
            own._resume()
    assert_same_output(output(model), output(lora) if gamma else output(stories()))
