"""Adapters carried from isotune to PEFT and back, and the outputs compared."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

import isotune
from isotune import Settings
from support import adapted, assert_same_output, move, output

Base = Callable[[], nn.Module]


def tiny_gpt2() -> nn.Module:
    """A GPT-2 of random weights, whose linear layers keep theirs transposed."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=32)
    return transformers.GPT2LMHeadModel(config).eval()


def through_peft(model: nn.Module, folder: Path) -> Any:
    """The model with the adapter in the folder, loaded by PEFT."""
    with warnings.catch_warnings():
        # PEFT warns of start values that the loaded tensors replace, and of projections drawn again.
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, folder).eval()


def by_peft(model: nn.Module, config: peft.PeftConfig, folder: Path, seed: int = 0) -> Any:
    """The model with an adapter of PEFT's, off its start; it is saved to the folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        theirs = move(peft.get_peft_model(model, config), seed)
        theirs.save_pretrained(folder)
    return theirs


def assert_peft_loads(
    base: Base, method: Settings, folder: Path, run: Callable[[nn.Module], Tensor] = output, **options: Any
) -> Any:
    """PEFT gives the outputs of a saved adapter, and so does isotune, bit for bit; returns the model."""
    model = adapted(base(), method, **options)
    isotune.save(model, folder)
    expected = run(model)
    assert_same_output(run(through_peft(base(), folder)), expected)
    assert not torch.allclose(expected, run(base()), atol=1e-3)
    assert torch.equal(run(isotune.load(base(), folder).eval()), expected)
    return model


def assert_isotune_loads(
    base: Base, config: peft.PeftConfig, folder: Path, run: Callable[[nn.Module], Tensor] = output
) -> Any:
    """isotune gives the outputs of what PEFT saved, and PEFT those of what isotune then saves; returns the model."""
    theirs = by_peft(base(), config, folder / "theirs")
    expected = run(theirs).detach()
    assert not torch.allclose(expected, run(base()), atol=1e-3)
    model = isotune.load(base(), folder / "theirs").eval()
    assert_same_output(run(model), expected)
    isotune.save(model, folder / "ours")
    assert_same_output(run(through_peft(base(), folder / "ours")), expected)
    return model
