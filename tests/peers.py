"""PEFT's own models, to compare with."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

import isotune
from support import assert_same_output, move, output


def peft_load(model: nn.Module, folder: Path) -> Any:
    """The model with the adapter in the folder, by PEFT."""
    with warnings.catch_warnings():
        # PEFT warns about odd ranks and about start values that the loaded tensors replace.
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, folder).eval()


def peft_adapt(model: nn.Module, config: peft.PeftConfig, seed: int = 0, size: float = 0.05) -> Any:
    """The model with a PEFT adapter that is off its start."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        return move(peft.get_peft_model(model, config), seed, size)


def assert_both_ways(ours: Any, theirs: Any, base: Any, folder: Path) -> None:
    """What `ours` saves PEFT computes, and what PEFT's model `theirs` saves isotune computes; `base()` is bare."""
    isotune.save(ours, folder / "ours")
    assert_same_output(output(peft_load(base(), folder / "ours")), output(ours))
    assert not torch.allclose(output(ours), output(base()), atol=1e-3)
    theirs.save_pretrained(folder / "theirs")
    loaded = isotune.load(base(), folder / "theirs").eval()
    assert_same_output(output(loaded), output(theirs))
    isotune.save(loaded, folder / "again")
    assert_same_output(output(peft_load(base(), folder / "again")), output(theirs))
