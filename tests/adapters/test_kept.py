"""What an adapter keeps between calls."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import isotune
from isotune.adapters.cache import Kept
from isotune.adapters.registry import method_class, method_names
from support import PROMPTS, Reader


def test_value_is_made_once_for_as_long_as_its_tensors_stay_as_they_are() -> None:
    kept, calls = Kept(), []
    a, b = torch.ones(2), torch.ones(3)

    def get(*of: torch.Tensor) -> int:
        kept.get(of, lambda: calls.append(1) or torch.zeros(1))  # type: ignore[func-returns-value]
        return len(calls)

    assert get(a, b) == get(a, b) == 1
    a.add_(1)
    assert get(a, b) == get(a, b) == 2
    assert get(a, b.clone()) == 3
    assert get(a.half(), b) == 4
    assert get(a) == 5


def test_copies_and_pickles_start_empty() -> None:
    kept, a = Kept(), torch.ones(2)
    kept.get([a], lambda: torch.zeros(1))
    for twin in (copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
        assert twin.get([a], lambda: torch.ones(1)) == 1
    assert kept.get([a], lambda: torch.ones(1)) == 0


def test_tensors_that_it_came_from_are_not_held() -> None:
    kept, a = Kept(), torch.ones(2)
    kept.get([a], lambda: torch.zeros(1))
    gone = weakref.ref(a)
    del a
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", method_names())
def test_what_is_kept_sees_the_steps_of_a_fused_optimizer(name: str, mode: bool) -> None:
    """Its steps leave no trace on a parameter: Trainer's default optimizer is one."""
    torch.manual_seed(0)
    kinds = method_class(name).kinds
    layer = Reader(64) if name in PROMPTS else nn.LayerNorm(64) if kinds == {"norm"} else nn.Linear(64, 64)
    method = isotune.method(name) if "rank" not in method_class(name).model_fields else isotune.method(name, rank=4)
    model: Any = isotune.adapt(nn.Sequential(layer), method, ["0"], seed=0)
    x = torch.randn(2, 4, 64)
    with torch.no_grad():
        before = model.eval()(x)
    optimizer = torch.optim.AdamW(isotune.parameter_groups(model, lr=1e-2), fused=True)
    model.train(mode)
    for _ in range(2):
        (model(x) - 1).square().sum().backward()
        optimizer.step()
        isotune.after_step(model)
        optimizer.zero_grad()
    model.eval()
    expected = model(x).detach()
    with torch.no_grad():
        found = model(x)
    assert not torch.allclose(expected, before, atol=1e-4)
    torch.testing.assert_close(found, expected)
