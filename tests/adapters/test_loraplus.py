"""What is particular to LoRA+: B's learning rate."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn

import isotune
from isotune import LoRA
from isotune.adapters.contract import Treatment
from isotune.adapters.low_rank.loraplus import LoRAPlus
from isotune.errors import OptionError
from isotune.model.rates import treatments
from peers import peft_adapt, peft_load
from support import adapted, assert_same_output, minilm, output


def test_only_b_gets_the_ratio_and_all_else_is_lora() -> None:
    model = isotune.adapt(minilm(), LoRAPlus(rank=4, ratio=8), ["query"], seed=3)
    same = isotune.adapt(minilm(), LoRA(rank=4), ["query"], seed=3)
    factors = {p: how.rate for p, how in treatments(model).items()}
    names = {name: factors.get(p, 1.0) for name, p in model.named_parameters() if p.requires_grad}
    assert len(names) == 12
    assert {(name.rpartition(".")[2], factor) for name, factor in names.items()} == {("A", 1.0), ("B", 8.0)}
    ours = [p for p in model.parameters() if p.requires_grad]
    theirs = [p for p in same.parameters() if p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_learning_rates_are_those_of_pefts_optimizer() -> None:
    theirs = peft_adapt(nn.Sequential(nn.Linear(8, 6)), peft.LoraConfig(r=2, target_modules=["0"]))
    groups = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16).param_groups
    rate_of = {p: group["lr"] for group in groups for p in group["params"]}
    layer = theirs.base_model.model[0]
    ours = isotune.adapt(nn.Sequential(nn.Linear(8, 6)), LoRAPlus(rank=2), ["0"])
    rates = ours[0].isotune["default"].parameter_groups()
    assert rate_of[layer.lora_B["default"].weight] == pytest.approx(1e-3 * rates["B"].rate)
    assert rate_of[layer.lora_A["default"].weight] == pytest.approx(1e-3 * rates.get("A", Treatment()).rate)


def test_factors_of_an_embedding_keep_the_plain_rate() -> None:
    model = isotune.adapt(minilm(), LoRAPlus(rank=4), ["word_embeddings"])
    assert all(how.rate == 1 for how in treatments(model).values())


def test_it_is_a_lora_for_peft_and_itself_for_isotune(tmp_path: Path) -> None:
    model = adapted(minilm(), LoRAPlus(rank=4, alpha=6, ratio=4), ["query", "value"])
    isotune.save(model, tmp_path)
    assert_same_output(output(peft_load(minilm(), tmp_path)), output(model))
    loaded = isotune.load(minilm(), tmp_path, trainable=True).eval()
    assert torch.equal(output(loaded), output(model))
    assert {how.rate for how in treatments(loaded).values()} == {4.0}


def test_ratio_must_be_positive() -> None:
    with pytest.raises(OptionError, match="loraplus: ratio=0"):
        LoRAPlus(ratio=0)
