"""Rows of one batch with different adapters of the methods beside LoRA."""

from __future__ import annotations

import pytest
import torch

import isotune
from support import adapted, assert_same_output, output, stories

OPTIONS = {"miss": {}, "miss mini": {"mini": 4}, "vera": {}, "randlora": {}}


@pytest.mark.parametrize("method", OPTIONS)
def test_rows_of_one_batch_use_different_adapters(method: str) -> None:
    model = stories()
    for rank, name in ((12, "one"), (20, "two")):
        settings = isotune.method(method.split()[0], rank=rank, **OPTIONS[method])
        size = 0.3 if method == "vera" else 0.02
        adapted(model, settings, ["q_proj", "o_proj", "down_proj"], name=name, seed=rank, size=size)
    expected = []
    for row, name in enumerate(("one", "two")):
        isotune.use(model, name)
        expected.append(output(model)[row])
    isotune.use(model, rows=["one", "two"], train=False)
    assert_same_output(output(model), torch.stack(expected))
    assert not torch.allclose(output(model), output(stories()), atol=1e-3)
