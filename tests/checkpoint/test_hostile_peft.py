"""Damaged folders of PEFT's own, which have no header or digest to check: still one clear error, nothing changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import isotune
from isotune.checkpoint.files import CONFIG, TENSORS
from isotune.errors import CheckpointError
from support import assert_unchanged, move, snapshot, stories

KEY = "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"


def config(**fields: Any) -> Callable[[Path], None]:
    """Set fields of the config; None takes one away."""

    def spoil(folder: Path) -> None:
        old = json.loads((folder / CONFIG).read_text())
        new = {name: value for name, value in {**old, **fields}.items() if value is not None}
        (folder / CONFIG).write_text(json.dumps(new))

    return spoil


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    """Change the tensors."""

    def spoil(folder: Path) -> None:
        found = load_file(folder / TENSORS)
        change(found)
        save_file(found, folder / TENSORS, metadata={"format": "pt"})

    return spoil


SPOILT = {
    "a key missing": (tensors(lambda t: t.__delitem__(KEY)), r"missing lora_A\.weight"),
    "a key left over": (
        tensors(lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2)})),
        "holds 'base_model.model.lm_head.weight', which is no tensor of 'LORA'",
    ),
    "an unknown tensor at a layer": (
        tensors(lambda t: t.update({KEY.replace("lora_A", "lora_magnitude_vector"): torch.ones(2)})),
        "lora_magnitude_vector",
    ),
    "a wrong shape": (
        tensors(lambda t: t.update({KEY: t[KEY][:, 1:].clone()})),
        r"shape \(3, 63\), expected",
    ),
    "NaN": (tensors(lambda t: t[KEY].fill_(float("nan"))), "not finite"),
    "no tensors at all": (tensors(lambda t: t.clear()), "is incomplete: it has no tensors of its type"),
    "no rank in the config": (config(r=None), "damaged: KeyError"),
    "another rank in the config": (config(r=5), r"expected \(5, 64\)"),
    "a rank that is no number": (config(r="three"), "rank='three'"),
    "a rank pattern that is no mapping": (config(rank_pattern=[1]), "damaged"),
    "the type of another method": (config(peft_type="HRA"), "is no tensor of 'HRA'"),
    "a layer that the model lacks": (
        tensors(lambda t: t.update({KEY.replace("layers.2", "layers.9"): t.pop(KEY)})),
        "this model has no layer 'model.layers.9.self_attn.q_proj'",
    ),
}


@pytest.mark.parametrize("how", SPOILT)
def test_spoilt_peft_folder_is_refused_and_nothing_changes(how: str, tmp_path: Path) -> None:
    spoil, said = SPOILT[how]
    theirs = peft.get_peft_model(stories(), peft.LoraConfig(r=3, target_modules=["q_proj"]))
    move(theirs).save_pretrained(tmp_path)
    spoil(tmp_path)
    model = stories()
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=said):
        isotune.load(model, tmp_path)
    assert_unchanged(model, before)
