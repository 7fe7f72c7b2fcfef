"""What is particular to OLoRA: its start, and PEFT's on GPT-2."""

from __future__ import annotations

import warnings
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import settings as profile
from hypothesis import strategies as st
from torch import nn

import isotune
from isotune.adapters.spectral.olora import OLoRA
from laws.layers import drawn_layer
from spectral import build, gpt2, linear, peft_adapt, peft_save, started
from support import assert_same_output, minilm, output, stories


@pytest.mark.parametrize("alpha", [None, 10.0])
@pytest.mark.parametrize("shape", [(12, 9), (9, 12)], ids=str)
def test_start_is_orthonormal_and_reproduces_the_first_columns(alpha: float | None, shape: tuple[int, int]) -> None:
    layer = linear(*shape)
    adapter = build(OLoRA(rank=4, alpha=alpha), layer)
    torch.testing.assert_close(adapter.B0.mT @ adapter.B0, torch.eye(4).double(), rtol=0, atol=1e-6)
    columns = adapter.scale * layer.weight[:, :4]
    torch.testing.assert_close(started(adapter)[:, :4], columns, rtol=0, atol=1e-6)
    # R is triangular, its diagonal positive, so that the start is the same wherever it is computed.
    assert (adapter.A0.diagonal() > 0).all()
    assert torch.equal(adapter.A0.tril(-1), torch.zeros_like(adapter.A0))


@given(drawn_layer("linear"), st.integers(1, 4))
def test_what_is_left_of_w_is_orthogonal_to_what_is_trained(layer: nn.Linear, rank: int) -> None:
    adapter = build(OLoRA(rank=min(rank, *layer.weight.shape)), layer)
    rest = layer.weight - started(adapter)
    torch.testing.assert_close(adapter.B0.mT @ rest, torch.zeros_like(adapter.A0), rtol=0, atol=1e-5)


@profile(max_examples=4)
@given(st.integers(1, 8), st.integers(1, 32), st.booleans())
def test_isotune_loads_what_peft_saves(
    tmp_path_factory: pytest.TempPathFactory, rank: int, alpha: int, rslora: bool
) -> None:
    for base, targets in ((stories, ["q_proj", "down_proj"]), (minilm, ["query", "value"])):
        config = peft.LoraConfig(
            r=rank, lora_alpha=alpha, use_rslora=rslora, init_lora_weights="olora", target_modules=targets
        )
        theirs = peft_adapt(base(), config)
        folder = peft_save(theirs, tmp_path_factory.mktemp("drawn"))
        loaded = isotune.load(base(), folder).eval()
        assert_same_output(output(loaded), output(theirs))
        assert isotune.describe(loaded)[0].method == "olora"


def test_peft_starts_gpt2_from_another_model_and_isotune_does_not_but_follows_its_folders(tmp_path: Path) -> None:
    # Only c_proj of the attention is square: anywhere else PEFT's layer fails when it is first called.
    config = peft.LoraConfig(
        r=4, lora_alpha=6, init_lora_weights="olora", target_modules=["attn.c_proj"], fan_in_fan_out=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fresh = peft.get_peft_model(gpt2(), config).eval()
    assert not torch.allclose(output(fresh), output(gpt2()), atol=1e-3)
    ours = isotune.adapt(gpt2(), OLoRA(rank=4, alpha=6), ["attn.c_proj"]).eval()
    assert torch.equal(output(ours), output(gpt2()))
    theirs = peft_adapt(gpt2(), config)
    loaded = isotune.load(gpt2(), peft_save(theirs, tmp_path)).eval()
    assert_same_output(output(loaded), output(theirs))
