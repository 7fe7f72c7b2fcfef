"""Torch's default dtype decides nothing about a merge."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import isotune
from isotune import LoRA
from isotune.checkpoint.files import TENSORS
from isotune.merging.contract import Rule
from isotune.merging.registry import rule_class, rule_names
from support import adapted, stories

RULES = [name for name in rule_names() if issubclass(rule_class(name), Rule) and rule_class(name).statistic is None]


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_merges_the_same_whatever_the_default_dtype(rule: str, tmp_path: Path) -> None:
    folders = [
        isotune.save(adapted(stories(), LoRA(rank=2), ["q_proj"], seed=seed), tmp_path / str(seed)) for seed in (0, 1)
    ]
    isotune.merge(folders, rule=rule, output=tmp_path / "expected", progress=False)
    torch.set_default_dtype(torch.bfloat16)
    try:
        isotune.merge(folders, rule=rule, output=tmp_path / "found", progress=False)
    finally:
        torch.set_default_dtype(torch.float32)
    one, two = (load_file(tmp_path / name / TENSORS) for name in ("expected", "found"))
    assert one.keys() == two.keys()
    assert all(one[name].equal(two[name]) for name in one)
