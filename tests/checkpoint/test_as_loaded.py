"""Adapters on bases whose files name, split or tie tensors otherwise than their modules do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import isotune
from isotune import HRA, LoRA
from isotune.checkpoint.as_loaded import AsLoaded, laid_out
from isotune.checkpoint.base import StoredBase
from isotune.checkpoint.parts import stored_parts
from isotune.checkpoint.read import read_stored
from isotune.errors import CheckpointError
from isotune.model.names import adapted_layers
from isotune.sites import require_site
from support import adapted

SMALL: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip


def llama(tied: bool) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, tie_word_embeddings=tied))


def mixtral() -> Any:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SMALL, num_local_experts=3))


def llava() -> Any:
    vision = transformers.CLIPVisionConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = transformers.LlamaConfig(**SMALL)
    return transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(text_config=text, vision_config=vision)
    )


CASES: dict[str, tuple[Any, Any]] = {
    "tied head": (lambda: llama(True), ["lm_head", "q_proj"]),
    "untied head": (lambda: llama(False), ["lm_head", "q_proj"]),
    "renamed": (llava, "attention"),
    "split experts": (mixtral, ["gate_up_proj", "down_proj"]),
}


@pytest.mark.parametrize("case", CASES)
def test_weights_of_adapted_layers_are_found_as_the_model_has_them(case: str, tmp_path: Path) -> None:
    make, targets = CASES[case]
    torch.manual_seed(0)
    make().save_pretrained(tmp_path / "base")
    model = type(make()).from_pretrained(tmp_path / "base")
    isotune.save(adapted(model, HRA(rank=2), targets), tmp_path / "adapter")
    layers = dict(adapted_layers(model))
    found = {
        p: site.weight
        for p, site, _ in stored_parts(read_stored(tmp_path / "adapter"), StoredBase(tmp_path / "base"))
    }
    assert found.keys() == layers.keys()
    for p, weight in found.items():
        assert torch.equal(weight, require_site(layers[p], p).weight), p


@pytest.mark.parametrize("case", ["tied head", "renamed"])
@pytest.mark.parametrize("method", [HRA(rank=2), LoRA(rank=2)], ids=["hra", "lora"])
def test_an_adapter_exports_from_its_folder_as_from_its_model(case: str, method: Any, tmp_path: Path) -> None:
    make, targets = CASES[case]
    make().save_pretrained(tmp_path / "base")
    model = adapted(type(make()).from_pretrained(tmp_path / "base"), method, targets)
    isotune.save(model, tmp_path / "adapter")
    isotune.export_lora(model, tmp_path / "from model")
    isotune.export_lora(tmp_path / "adapter", tmp_path / "from folder")
    one, two = (read_stored(tmp_path / name) for name in ("from model", "from folder"))
    assert all(torch.equal(one.state[p][key], t) for p, own in two.state.items() for key, t in own.items())


def test_a_folder_that_transformers_cannot_lay_out_has_its_own_names_only(tmp_path: Path) -> None:
    llama(True).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text('{"architectures": ["NoSuchModel"], "model_type": "llama"}')
    assert AsLoaded(laid_out(tmp_path / "base"), ["a"]).sources == {}
    with pytest.raises(CheckpointError, match=r"has no tensor 'lm_head\.weight'"):
        StoredBase(tmp_path / "base").weight("lm_head")


def test_a_damaged_config_is_told_when_an_adapter_is_exported(tmp_path: Path) -> None:
    llama(False).save_pretrained(tmp_path / "base")
    isotune.save(adapted(llama(False), LoRA(rank=2), ["q_proj"]), tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"CAUSAL_LM"', "null"))
    (tmp_path / "base" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        isotune.export_lora(tmp_path / "adapter", tmp_path / "lora", base=tmp_path / "base")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": "../b.safetensors"}}'])
def test_a_damaged_index_of_shards_is_told(text: str, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(CheckpointError, match=r"index.json (cannot be read|names a file outside its folder)"):
        StoredBase(tmp_path)
