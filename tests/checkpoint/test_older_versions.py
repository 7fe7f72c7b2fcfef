"""Adapters as version 0.1.0 wrote them load, and compute what they computed there."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import isotune
from support import DATA, assert_same_output, stories

FOLDER = DATA / "v0.1.0"


def gpt2() -> Any:
    config = transformers.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    model.load_state_dict(load_file(FOLDER / "gpt2.safetensors"), strict=False)
    return model


def stored(name: str, model: nn.Module) -> nn.Module:
    model.load_state_dict(load_file(FOLDER / f"{name}.safetensors"))
    return model.eval()


def logits(model: Any) -> Tensor:
    return model(input_ids=torch.arange(5, 25).view(2, 10)).logits[:, -1]


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Tensor]]] = {
    "hra": (stories, logits),
    "lora_and_norm": (stories, logits),
    "gpt2": (gpt2, logits),
    "lstm": (
        lambda: stored("lstm", nn.Sequential(nn.LSTM(8, 6, batch_first=True))),
        lambda model: model(torch.linspace(-1, 1, 2 * 5 * 8).view(2, 5, 8))[0],
    ),
    # In 0.1.0 a convolution of one dimension was a parameter of its module.
    "conv1d": (
        lambda: stored("conv1d", nn.Sequential(nn.Conv1d(3, 4, 3))),
        lambda model: model(torch.linspace(-1, 1, 3 * 9).view(1, 3, 9)),
    ),
    "conv": (
        lambda: stored("conv", nn.Sequential(nn.Conv2d(3, 4, 3))),
        lambda model: model(torch.linspace(-1, 1, 3 * 6 * 6).view(1, 3, 6, 6)),
    ),
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_adapter_of_version_0_1_0_loads_and_computes_the_same(name: str, tmp_path: Path) -> None:
    make, call = CASES[name]
    expected = load_file(FOLDER / "expected.safetensors")[name]
    assert not torch.allclose(call(make()), expected, atol=1e-4)
    with warnings.catch_warnings():
        # What 0.1.0 stored of GPT-2's config depends on the version of transformers.
        warnings.simplefilter("ignore" if name == "gpt2" else "error", UserWarning)
        model = isotune.load(make(), FOLDER / name)
    assert_same_output(call(model), expected)
    isotune.save(model, tmp_path)
    assert_same_output(call(isotune.load(make(), tmp_path)), expected)


def test_adapter_of_version_0_1_0_on_a_base_with_another_config_warns() -> None:
    model = stories()
    model.config.rms_norm_eps = 1e-3
    with pytest.warns(UserWarning, match=r"by an isotune before 0\.2 for a base with another configuration"):
        isotune.load(model, FOLDER / "hra")
