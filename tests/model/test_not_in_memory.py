"""Layers whose weights are elsewhere, or nowhere, are refused by name; nothing is computed from what is not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from torch import nn

import isotune
from isotune import HRA, LoRA
from isotune.errors import CheckpointError, TargetError


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def offloaded() -> nn.Sequential:
    model = network()
    cpu_offload(model, torch.device("cpu"))
    return model


def on_meta() -> nn.Sequential:
    with torch.device("meta"):
        return network()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    model = isotune.adapt(network(), LoRA(rank=2), ["0"], train_also=["2"])
    return isotune.save(model, tmp_path / "adapter")


def test_an_offloaded_layer_takes_no_adapter(adapter: Path) -> None:
    with pytest.raises(TargetError, match=r"'0' is offloaded: .* leave them out"):
        isotune.adapt(offloaded(), HRA(rank=2), ["0"])
    half = network()
    cpu_offload(half[2], torch.device("cpu"))
    with pytest.raises(TargetError, match="'2' is offloaded"):
        isotune.adapt(half, HRA(rank=2), ["0"], train_also=["2"])
    with pytest.raises(TargetError, match="'0' is offloaded"):
        isotune.load(offloaded(), adapter)


def test_an_adapter_is_not_loaded_onto_the_meta_device_nor_saved_from_it(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"'0' is on the meta device: .* from_pretrained"):
        isotune.load(on_meta(), adapter)
    model = isotune.adapt(on_meta(), LoRA(rank=2), ["0"])
    with pytest.raises(CheckpointError, match="on the meta device: it has no values to save"):
        isotune.save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
