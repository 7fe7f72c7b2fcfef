"""What an adapter keeps between calls."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import torch

from isotune.adapters.cache import Kept


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
