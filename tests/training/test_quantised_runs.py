"""Runs on a quantised base: from the recipe to the export, whose base is dense again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
import transformers
from tiny import sentences, write_jsonl
from torch import nn

import isotune
from isotune.errors import OptionError
from isotune.quantised import dequantized, is_packed
from isotune.training.evaluation import evaluate
from isotune.training.export import export_merged
from isotune.training.models import load_causal
from isotune.training.recipe import build_recipe
from isotune.training.run import train

# bitsandbytes says at each call that it rounds to half precision.
pytestmark = pytest.mark.filterwarnings("ignore:.*MatMul8bitLt", "ignore::FutureWarning")
KINDS = ["int8", "nf4", "llm-int8"]
ERRORS = {"int8": 0.01, "nf4": 0.2, "llm-int8": 0.01}
"""How far a weight is from its dequantised one, relative, at most: half a step of 127, or of 16 levels."""


@pytest.mark.parametrize("how", KINDS)
def test_each_kind_is_dequantised_to_about_the_weight(how: str, llama: Path) -> None:
    plain, packed = load_causal(str(llama)), load_causal(str(llama), quantization=how)
    path = "model.layers.0.mlp.up_proj"
    W, layer = plain.get_submodule(path).weight, packed.get_submodule(path)
    for _ in range(2):  # bitsandbytes moves what it needs at the first call
        W = W.detach()
        found = dequantized(layer)
        assert found.shape == W.shape
        assert float((found - W).norm() / W.norm()) < ERRORS[how]
        x = torch.randn(3, W.shape[1])
        torch.testing.assert_close(layer(x).detach(), nn.functional.linear(x, found.float()), rtol=0.05, atol=0.05)


def test_a_weight_that_an_evaluation_has_packed_anew_is_dequantised_too() -> None:
    layer = bitsandbytes.nn.Linear4bit(128, 64, bias=False, quant_type="nf4").to("cpu").eval()
    before = dequantized(layer).float()
    with torch.no_grad():
        layer(torch.randn(3, layer.in_features))
    if not getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        pytest.skip("bitsandbytes has no form of its own for this processor")
    torch.testing.assert_close(dequantized(layer).float(), before, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("how", KINDS)
def test_a_run_on_a_quantised_base_goes_to_its_end(how: str, llama: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "x.jsonl", [{"prompt": "the cat", "completion": "sees a dog"}] * 16)
    flags: dict[str, Any] = {
        "model": str(llama), "task": "causal-lm", "data.train": str(rows), "output": str(tmp_path / "run"),
        "quantization": how, "targets": "all-linear", "method.rank": 4, "training.max_steps": 6,
        "training.learning_rate": 0.02, "training.report_to": "none",
    }  # fmt: skip
    result = train(build_recipe(None, flags), progress=False)
    assert result.metrics["validation_loss"] < result.metrics["validation_base_loss"]
    assert json.loads((result.adapter / "task.json").read_text())["quantization"] == how
    again = evaluate(result.output, str(rows), progress=False)
    assert again["loss"] == pytest.approx(result.metrics["validation_loss"], rel=1e-2)
    lora = isotune.export_lora(result.adapter, tmp_path / "lora", base=str(llama))
    assert max(lora.residuals.values()) < 1e-5
    merged = export_merged(result.adapter, tmp_path / "merged", base=str(llama))
    whole = transformers.AutoModelForCausalLM.from_pretrained(merged)
    assert whole.get_submodule("model.layers.0.mlp.up_proj").weight.dtype == torch.float32
    assert evaluate(merged, str(rows), progress=False)["loss"] == pytest.approx(again["loss"], rel=0.05)


def test_a_classifier_trains_on_a_quantised_base_with_its_head_in_full(bert: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "x.jsonl", sentences(60, 0))
    flags = {"model": str(bert), "data.train": str(rows), "output": str(tmp_path / "run"), "quantization": "int8",
             "training.max_steps": 2, "training.report_to": "none"}  # fmt: skip
    result = train(build_recipe(None, flags), progress=False)
    assert result.metrics["validation_accuracy"] >= 0.5
    assert is_packed(result.model.get_submodule("bert.encoder.layer.0.attention.self.query"))


def test_a_full_fine_tuning_has_no_quantised_base(llama: Path, tmp_path: Path) -> None:
    flags = {"model": str(llama), "task": "causal-lm", "data.train": "x", "output": str(tmp_path / "run"),
             "quantization": "int8", "method.name": "full"}  # fmt: skip
    with pytest.raises(OptionError, match="quantization is for a frozen base"):
        train(build_recipe(None, flags), progress=False)
