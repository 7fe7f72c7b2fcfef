"""Adapters exported as one exact LoRA, from a model or from a folder."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import isotune
from isotune import HRA, LoRA, Settings
from isotune.checkpoint.files import CARD, CONFIG, TENSORS
from isotune.errors import CheckpointError, NoLowRankFormError, OptionError
from laws.case import registered
from laws.test_toy_method import Gain
from support import DATA, MINILM, adapted, assert_same_output, files, minilm, output, resnet20, stories

STORIES = DATA / "stories260k"
METHODS = {
    "hra": HRA(rank=4),
    "hra odd": HRA(rank=3, start="random"),
    "hra strict": HRA(rank=3, strict=True),
    "hra out": HRA(rank=4, side="out"),
    "lora": LoRA(rank=3, alpha=7),
    "rslora": LoRA(rank=4, rslora=True),
}


def through_peft(model: nn.Module, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, folder).eval()


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text())


@pytest.mark.parametrize("method", METHODS)
def test_exported_lora_computes_the_same_through_peft_and_here(method: str, tmp_path: Path) -> None:
    model = adapted(stories(), METHODS[method], "all-linear")
    export = isotune.export_lora(model, tmp_path / "lora")
    assert export.residual < 1e-5
    assert len(export.residuals) == 35
    assert_same_output(output(through_peft(stories(), tmp_path / "lora")), output(model))
    assert_same_output(output(isotune.load(stories(), tmp_path / "lora").eval()), output(model))


def test_the_residual_is_measured_by_another_way_than_the_factors_were_made(tmp_path: Path) -> None:
    residuals = isotune.export_lora(adapted(minilm(), HRA(rank=8), "query-value"), tmp_path / "lora").residuals
    assert all(1e-9 < residual < 1e-5 for residual in residuals.values())


def test_exported_lora_is_plain_enough_for_any_server(tmp_path: Path) -> None:
    isotune.export_lora(adapted(minilm(), HRA(rank=4), ["query"]), tmp_path / "lora")
    config = config_of(tmp_path / "lora")
    assert config["peft_type"] == "LORA"
    assert config["lora_alpha"] == config["r"] == 4
    assert config["bias"] == "none"
    assert not any(config[name] for name in ("rank_pattern", "alpha_pattern", "use_rslora", "modules_to_save"))
    tensors = load_file(tmp_path / "lora" / TENSORS)
    assert len(tensors) == 12
    assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in tensors)
    card = (tmp_path / "lora" / CARD).read_text()
    assert "library_name: peft" in card
    assert card.count("| encoder.layer.") == 6


def test_export_of_a_causal_model_opens_with_its_base_in_peft(tmp_path: Path) -> None:
    model = stories()
    model.save_pretrained(tmp_path / "base")
    base = type(model).from_pretrained(tmp_path / "base")
    saved = isotune.save(adapted(base, HRA(rank=2), ["q_proj"]), tmp_path / "adapter")
    for source in (base, saved):
        isotune.export_lora(source, tmp_path / "lora")
        assert config_of(tmp_path / "lora")["task_type"] == "CAUSAL_LM"
        opened = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora")
        assert_same_output(output(opened.eval()), output(base))


def test_stack_of_methods_with_mixed_ranks_becomes_one_lora_of_one_rank(tmp_path: Path) -> None:
    model = adapted(stories(), HRA(rank=4), ["q_proj", "v_proj"], name="one", overrides={"q_proj": {"rank": 6}})
    adapted(model, LoRA(rank=3), ["v_proj", "up_proj"], name="two", seed=1)
    isotune.use(model, "one", "two")
    export = isotune.export_lora(model, tmp_path / "lora", rank_multiple=8)
    assert {path.rpartition(".")[2]: rank for path, rank in export.ranks.items()} == {
        "q_proj": 6, "v_proj": 7, "up_proj": 3,
    }  # fmt: skip
    assert export.rank == config_of(tmp_path / "lora")["r"] == 8
    assert export.residual < 1e-5
    assert_same_output(output(through_peft(stories(), tmp_path / "lora")), output(model))
    isotune.use(model, "two", "one")
    isotune.export_lora(model, tmp_path / "other")
    assert config_of(tmp_path / "other")["r"] == 7
    assert_same_output(output(through_peft(stories(), tmp_path / "other")), output(model))


@pytest.mark.parametrize(("dtype", "residual"), [("float32", 1e-6), ("float16", 1e-3), ("bfloat16", 1e-2)])
def test_storage_dtype_is_what_was_asked_and_the_residual_says_what_it_costs(
    dtype: str, residual: float, tmp_path: Path
) -> None:
    model = adapted(stories(), HRA(rank=4), "all-linear")
    export = isotune.export_lora(model, tmp_path / "lora", dtype=dtype)
    assert {t.dtype for t in load_file(tmp_path / "lora" / TENSORS).values()} == {getattr(torch, dtype)}
    assert export.dtype == dtype
    assert residual / 1000 < export.residual < residual
    assert f"stored as {dtype}" in (tmp_path / "lora" / CARD).read_text()
    assert_same_output(output(through_peft(stories(), tmp_path / "lora")), output(model), 100 * residual)
    again = isotune.export_lora(model, tmp_path / "again", dtype=getattr(torch, dtype))
    assert again.residuals == export.residuals


@pytest.mark.parametrize("method", ["hra", "hra strict", "lora"])
@pytest.mark.parametrize("base", ["minilm", "stories"])
def test_folder_exports_to_the_same_bytes_as_the_model(method: str, base: str, tmp_path: Path) -> None:
    where = {"minilm": MINILM, "stories": STORIES}[base]
    model = adapted({"minilm": minilm, "stories": stories}[base](), METHODS[method], "attention")
    isotune.save(model, tmp_path / "adapter", base_model=str(where))
    one = isotune.export_lora(model, tmp_path / "one", rank_multiple=8)
    two = isotune.export_lora(tmp_path / "adapter", tmp_path / "two", rank_multiple=8)
    assert files(tmp_path / "one")[TENSORS] == files(tmp_path / "two")[TENSORS]
    assert one.ranks == two.ranks
    assert two.residual < 1e-5
    three = isotune.export_lora(tmp_path / "adapter", tmp_path / "three", base=where, rank_multiple=8)
    assert three.residuals == two.residuals


def test_modules_trained_in_full_go_along(tmp_path: Path) -> None:
    model = adapted(minilm(), HRA(rank=4), ["query"], train_also=["pooler"])
    isotune.export_lora(model, tmp_path / "lora")
    assert config_of(tmp_path / "lora")["modules_to_save"] == ["pooler"]
    assert "trained in full (pooler)" in (tmp_path / "lora" / CARD).read_text()
    loaded = through_peft(minilm(), tmp_path / "lora")
    ids = torch.tensor([[101, 2023, 102]])
    assert_same_output(loaded(ids).pooler_output, model(ids).pooler_output)


@pytest.mark.parametrize("method", [HRA(rank=4), LoRA(rank=4)], ids=lambda method: method.name)
def test_convolutions_of_a_resnet_export(method: Settings, tmp_path: Path) -> None:
    model, images = adapted(resnet20(), method, r"layer2\..*conv\d", size=0.02), torch.randn(2, 3, 32, 32)
    export = isotune.export_lora(model, tmp_path / "lora")
    assert len(export.ranks) == 6
    assert export.residual < 1e-5
    assert_same_output(output(through_peft(resnet20(), tmp_path / "lora"), x=images), output(model, x=images))


def test_base_in_half_precision_exports_exactly_to_fp32(tmp_path: Path) -> None:
    model = adapted(stories().bfloat16(), HRA(rank=4))
    assert isotune.export_lora(model, tmp_path / "lora").residual < 1e-5


def test_exporting_a_model_in_training_measures_it_without_dropout_and_leaves_it_so(tmp_path: Path) -> None:
    model = adapted(minilm(), LoRA(rank=4, dropout=0.5), ["query"]).train()
    assert isotune.export_lora(model, tmp_path / "lora").residual < 1e-6
    assert all(module.training for module in model.modules())


def test_method_without_an_exact_form_is_refused_and_the_layer_named(tmp_path: Path) -> None:
    with registered(Gain):
        model = adapted(stories(), Gain(), ["v_proj"])
        with pytest.raises(NoLowRankFormError) as error:
            isotune.export_lora(model, tmp_path / "lora")
    assert "'model.layers.0.self_attn.v_proj' cannot be exported as a LoRA" in str(error.value)
    assert "gain has no exact low-rank form" in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [({"dilation": 2}, "dilation or padding mode PEFT ignores"), ({"groups": 3}, "groups=3")],
    ids=["dilation", "groups"],
)
def test_convolutions_that_a_lora_in_peft_ignores_are_refused(
    options: dict[str, int], said: str, tmp_path: Path
) -> None:
    model = adapted(nn.Sequential(nn.Conv2d(3, 6, 3, **options)), HRA(rank=2), ["0"])
    with pytest.raises(NoLowRankFormError, match=said):
        isotune.export_lora(model, tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []


def test_change_that_does_not_fit_the_dtype_is_refused(tmp_path: Path) -> None:
    model = adapted(stories(), LoRA(rank=2), ["q_proj"], size=1e6)
    with pytest.raises(CheckpointError, match=r"does not fit into torch\.float16; export as bfloat16 or float32"):
        isotune.export_lora(model, tmp_path / "lora", dtype="float16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "int8"}, "dtype 'int8' is not usable; choose from float32, float16, bfloat16"),
        ({"rank_multiple": 0}, "rank_multiple=0 is not usable"),
    ],
)
def test_unusable_options_are_refused(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=said):
        isotune.export_lora(adapted(stories(), HRA(rank=2)), tmp_path / "lora", **options)


def test_nothing_to_export_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no adapter is active"):
        isotune.export_lora(stories(), tmp_path / "lora")
    model = isotune.fold(adapted(stories(), HRA(rank=2)))
    with pytest.raises(CheckpointError, match="call unfold before exporting"):
        isotune.export_lora(model, tmp_path / "lora")


def test_folder_without_a_usable_base_says_how_to_name_one(tmp_path: Path) -> None:
    model = stories()
    model.config._name_or_path = ""
    isotune.save(adapted(model, HRA(rank=2)), tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="does not say which base it was made for; name it with base="):
        isotune.export_lora(tmp_path / "adapter", tmp_path / "lora")
    with pytest.raises(CheckpointError, match="base="):
        isotune.export_lora(tmp_path / "adapter", tmp_path / "lora", base=MINILM)
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
        isotune.export_lora(tmp_path / "adapter", tmp_path / "lora", base=tmp_path)
    assert not (tmp_path / "lora").exists()
