"""Activation checkpointing does not repeat what depends on an adapter's parameters alone, and loses no gradient."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import isotune

METHODS = {
    "hra": {"rank": 4, "start": "random"},
    "hoft": {"rank": 4},
    "oft": {"block": 4},
    "boft": {"block": 4},
    "dora": {"rank": 2},
    "pissa": {"rank": 2},
    "vera": {"rank": 4},
    "lora": {"rank": 2, "alpha": 6.0},
}
MAKES = {"hra": "thin", "oft": "blocks", "boft": "blocks", "dora": "scaling", "pissa": "change", "vera": "change"}
"""What of each is counted."""


class Blocks(nn.Module):
    """Three adapted layers; the two later ones as one checkpoint, if any."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor, **how: Any) -> Tensor:
        x = self.first(x)
        return checkpoint(self.rest, x, **how) if how else self.rest(x)

    def rest(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(x))))


def adapted(name: str) -> Blocks:
    torch.manual_seed(0)
    model = isotune.adapt(Blocks(), isotune.method(name, **METHODS[name]), ["first", "second", "third"], seed=0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model.double()


def gradients(model: nn.Module, x: Tensor, **how: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(x, **how).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls of a method of an adapter's class."""

    def count(adapter: nn.Module, name: str) -> list[int]:
        calls: list[int] = []
        real = getattr(type(adapter), name)

        def counting(self: Any, *args: Any) -> Any:
            calls.append(id(self))
            return real(self, *args)

        monkeypatch.setattr(type(adapter), name, counting)
        return calls

    return count


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_those_without_checkpointing(name: str, reentrant: bool) -> None:
    model, x = adapted(name), torch.randn(5, 16, dtype=torch.float64)
    expected = gradients(model, x)
    for _ in range(2):
        found = gradients(model, x, use_reentrant=reentrant)
        assert found.keys() == expected.keys()
        assert len(found) >= 3
        for key, gradient in expected.items():
            torch.testing.assert_close(found[key], gradient)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", MAKES)
def test_the_algebra_runs_once_a_step(name: str, reentrant: bool, counted: Any) -> None:
    model, x = adapted(name), torch.randn(5, 16, dtype=torch.float64)
    calls = counted(model.first.isotune["default"], MAKES[name])
    gradients(model, x, use_reentrant=reentrant)
    assert len(calls) == len(set(calls)) == 3
    gradients(model, x, use_reentrant=reentrant)
    assert len(calls) == 6


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_changed_parameter_is_seen_and_accumulated_steps_add_up(reentrant: bool) -> None:
    model, x = adapted("hra"), torch.randn(5, 16, dtype=torch.float64)
    before = gradients(model, x, use_reentrant=reentrant)
    model(x, use_reentrant=reentrant).square().sum().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, 2 * before[name])
            with torch.no_grad():
                p.mul_(1.5).add_(0.1)
    expected = gradients(model, x)
    for name, gradient in gradients(model, x, use_reentrant=reentrant).items():
        torch.testing.assert_close(gradient, expected[name])


@pytest.mark.parametrize("reentrant", [False, True])
def test_several_losses_go_backward_one_by_one(reentrant: bool) -> None:
    model = adapted("hra")
    x, z = torch.randn(2, 5, 16, dtype=torch.float64)
    expected = [gradients(model, rows) for rows in (x, z)]
    model.zero_grad()
    losses = [model(rows, use_reentrant=reentrant).square().sum() for rows in (x, z)]
    for loss in losses:
        loss.backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, expected[0][name] + expected[1][name])


@pytest.mark.parametrize("reentrant", [False, True])
def test_nothing_is_kept_after_the_step(reentrant: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = adapted("hra"), torch.randn(5, 16, dtype=torch.float64)
    made: list[Any] = []
    adapter = model.third.isotune["default"]
    real = type(adapter).thin

    def remembered(self: Any, *args: Any) -> Any:
        U, M = real(self, *args)
        made.extend((weakref.ref(U), weakref.ref(M)))
        return U, M

    monkeypatch.setattr(type(adapter), "thin", remembered)
    gradients(model, x, use_reentrant=reentrant)
    gc.collect()
    assert len(made) == 6
    assert [ref() for ref in made] == [None] * 6


def test_a_checkpoint_that_chooses_what_it_keeps_sees_every_operation() -> None:
    model, x = adapted("hra"), torch.randn(5, 16, dtype=torch.float64)
    expected = gradients(model, x)
    keep = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]

    def context() -> Any:
        return create_selective_checkpoint_contexts(keep)

    found = gradients(model, x, use_reentrant=False, context_fn=context)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


def test_copies_and_pickles_in_the_middle_of_a_step_start_empty() -> None:
    model, x = adapted("hra"), torch.randn(5, 16, dtype=torch.float64)
    loss = model(x, use_reentrant=True).square().sum()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.third.isotune["default"]._once._graph is None
    loss.backward()
    assert model.third.isotune["default"]._once._graph is None


def test_a_second_derivative_goes_through_a_checkpoint() -> None:
    model, x = adapted("hra"), torch.randn(5, 16, dtype=torch.float64, requires_grad=True)

    def second(**how: Any) -> Tensor:
        (g,) = torch.autograd.grad(model(x, **how).square().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), model.third.isotune["default"].U)[0]

    torch.testing.assert_close(second(use_reentrant=False), second())
