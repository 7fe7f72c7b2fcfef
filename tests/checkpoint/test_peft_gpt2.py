"""GPT-2's transposed layers on disk, with PEFT and through an export."""

from __future__ import annotations

import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import nn

import isotune
from isotune import HRA, LoRA, Settings
from isotune.adapters.low_rank.dora import DoRA
from support import adapted, assert_same_output, minilm, move, output

TARGETS = ["c_attn", "c_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 in a folder."""
    folder = tmp_path_factory.mktemp("gpt2")
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=32)
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def gpt2(base: Path) -> nn.Module:
    return transformers.GPT2LMHeadModel.from_pretrained(base).eval()


@pytest.mark.parametrize("method", [LoRA(rank=4, alpha=6), DoRA(rank=4, alpha=6)], ids=lambda method: method.name)
def test_lora_on_gpt2_goes_both_ways(method: Settings, base: Path, tmp_path: Path) -> None:
    model = adapted(gpt2(base), method, TARGETS)
    isotune.save(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(gpt2(base), tmp_path / "ours").eval()
    assert_same_output(output(theirs), output(model))
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_output(output(isotune.load(gpt2(base), tmp_path / "theirs").eval()), output(model))


def test_hra_on_gpt2_is_isotunes_own_type_and_exports_to_a_lora_that_peft_loads(base: Path, tmp_path: Path) -> None:
    model = adapted(gpt2(base), HRA(rank=4), TARGETS)
    isotune.save(model, tmp_path / "ours")
    assert "ISOTUNE_HRA" in (tmp_path / "ours" / "adapter_config.json").read_text()
    assert "kind gpt2_conv1d, which PEFT's HRA does not adapt" in (tmp_path / "ours" / "README.md").read_text()
    assert torch.equal(output(isotune.load(gpt2(base), tmp_path / "ours").eval()), output(model))
    for number, source in enumerate((model, tmp_path / "ours")):
        assert isotune.export_lora(source, tmp_path / str(number)).residual < 1e-5
        theirs = peft.PeftModel.from_pretrained(gpt2(base), tmp_path / str(number)).eval()
        assert_same_output(output(theirs), output(model))


def test_hra_on_an_embedding_is_isotunes_own_type(tmp_path: Path) -> None:
    model = adapted(minilm(), HRA(rank=2), ["word_embeddings", "query"])
    isotune.save(model, tmp_path)
    assert "ISOTUNE_HRA" in (tmp_path / "adapter_config.json").read_text()
    assert torch.equal(output(isotune.load(minilm(), tmp_path).eval()), output(model))


def test_peft_lora_on_gpt2_exports_from_its_folder(base: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, fan_in_fan_out=True)
    theirs = move(peft.get_peft_model(gpt2(base), config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "theirs")
    export = isotune.export_lora(tmp_path / "theirs", tmp_path / "lora", base=base)
    assert export.residual < 1e-5
    again = peft.PeftModel.from_pretrained(gpt2(base), tmp_path / "lora").eval()
    assert_same_output(output(again), output(theirs))
