"""What the tests of methods that start from a decomposition of W share."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

from isotune import Settings
from isotune.sites import require_site
from support import move


def build(settings: Settings, layer: nn.Module, seed: int = 0) -> Any:
    """An adapter for the layer, in the layer's dtype where that is double."""
    adapter = settings.build(require_site(layer, "layer"), torch.Generator().manual_seed(seed))
    return adapter.double() if layer.weight.dtype == torch.float64 else adapter


def linear(n_in: int = 12, n_out: int = 9) -> nn.Linear:
    """A frozen layer in double precision."""
    return nn.Linear(n_in, n_out).double().requires_grad_(False)


def started(adapter: Any) -> Tensor:
    """The part of W that is trained, s B0 A0."""
    return adapter.scale * adapter.B0 @ adapter.A0


def gpt2() -> Any:
    """A tiny GPT-2, whose layers keep their weights transposed."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=32)
    return transformers.GPT2LMHeadModel(config).eval()


def peft_adapt(model: nn.Module, config: peft.PeftConfig, size: float = 0.02) -> Any:
    """PEFT's adapter on the model, off its start."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return move(peft.get_peft_model(model, config), size=size)


def peft_load(model: nn.Module, folder: Path) -> Any:
    """What PEFT makes of an adapter folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, folder).eval()


def peft_save(model: Any, folder: Path) -> Path:
    """Let PEFT write the folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return folder
