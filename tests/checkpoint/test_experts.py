"""LoRAs on single experts, as PEFT wrote them before transformers made the experts of a layer one parameter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

import isotune
from isotune.checkpoint.export import export_lora
from isotune.errors import CheckpointError

IDS = torch.arange(12).view(2, 6)
SIZES = {"w1": (24, 32), "w2": (32, 24), "w3": (24, 32)}  # out, in; of Mixtral's files
BLOCK = "model.layers.0.block_sparse_moe.experts"


def mixtral() -> Any:
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=64, hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2,
        )
    ).eval()  # fmt: skip


def write(folder: Path, names: list[tuple[int, str]], block: str = BLOCK, **config: Any) -> dict[str, Tensor]:
    """An adapter folder with LoRAs on these experts' matrices."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    rank_of = config.get("rank_pattern", {})
    for expert, name in names:
        out, n = SIZES[name]
        rank = rank_of.get(name, 2)
        key = f"base_model.model.{block}.{expert}.{name}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, n, generator=generator)
        tensors[f"{key}.lora_B.weight"] = torch.randn(out, rank, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": sorted(SIZES), "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps({**fields, "base_model_name_or_path": None, **config}))
    return tensors


def change(tensors: Mapping[str, Tensor], expert: int, name: str, scale: float) -> Tensor:
    key = f"base_model.model.{BLOCK}.{expert}.{name}"
    if f"{key}.lora_A.weight" not in tensors:
        return torch.zeros(SIZES[name])
    return scale * tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]


@pytest.mark.parametrize(
    "names",
    [[(e, w) for e in range(3) for w in SIZES], [(1, "w3"), (2, "w1"), (2, "w3"), (0, "w2")]],
    ids=["all", "some"],
)
def test_loras_on_single_experts_change_the_rows_of_the_joined_matrices(
    names: list[tuple[int, str]], tmp_path: Path
) -> None:
    tensors = write(tmp_path / "old", names, rank_pattern={"w3": 3})
    model, right = isotune.load(mixtral(), tmp_path / "old"), mixtral()
    experts = right.model.layers[0].mlp.experts
    with torch.no_grad():
        for e in range(3):
            gate_up = torch.cat([change(tensors, e, "w1", 3.0), change(tensors, e, "w3", 2.0)])
            experts.gate_up_proj[e] += gate_up
            experts.down_proj[e] += change(tensors, e, "w2", 3.0)
    torch.testing.assert_close(model(IDS).logits, right(IDS).logits)


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")  # PEFT of itself
def test_peft_converts_them_to_the_same_model(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", minversion="0.21")
    write(tmp_path / "old", [(e, w) for e in range(3) for w in SIZES])
    theirs = peft.PeftModel.from_pretrained(mixtral(), tmp_path / "old").eval()
    torch.testing.assert_close(isotune.load(mixtral(), tmp_path / "old")(IDS).logits, theirs(IDS).logits)


def test_saved_again_they_are_on_the_joined_matrices_and_load(tmp_path: Path) -> None:
    write(tmp_path / "old", [(0, "w1"), (0, "w2")])
    model = isotune.load(mixtral(), tmp_path / "old")
    isotune.save(model, tmp_path / "new")
    assert torch.equal(isotune.load(mixtral(), tmp_path / "new")(IDS).logits, model(IDS).logits)


def test_a_lora_is_exported_from_their_folder_and_loads_alike(tmp_path: Path) -> None:
    write(tmp_path / "old", [(e, w) for e in range(3) for w in SIZES])
    mixtral().save_pretrained(tmp_path / "base")
    export_lora(tmp_path / "old", tmp_path / "lora", base=tmp_path / "base")
    one, other = (isotune.load(mixtral(), tmp_path / name)(IDS).logits for name in ("old", "lora"))
    torch.testing.assert_close(one, other)


def test_experts_of_a_model_that_has_none_are_of_another_base(tmp_path: Path) -> None:
    write(tmp_path / "old", [(0, "w1")], block="model.layers.7.block_sparse_moe.experts")
    with pytest.raises(CheckpointError, match=r"another base: this model has no layer .*experts"):
        isotune.load(mixtral(), tmp_path / "old")
