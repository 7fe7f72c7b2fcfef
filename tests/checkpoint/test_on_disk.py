"""Adapters of which nothing stays in memory: the same tensors, read when they are asked for."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import isotune
from isotune import LoRA
from isotune.checkpoint.files import TENSORS
from isotune.checkpoint.read import read_stored
from isotune.checkpoint.stored import OnDisk
from isotune.errors import CheckpointError


def folder(path: Path, seed: int = 0) -> Path:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4), nn.Linear(4, 3))
    isotune.adapt(model, LoRA(rank=2), ["0", "1"], train_also=["2"], seed=seed)
    return isotune.save(model, path)


def test_all_that_is_read_is_as_it_is_in_memory(tmp_path: Path) -> None:
    path = folder(tmp_path / "adapter")
    whole, lazy = read_stored(path), read_stored(path, in_memory=False)
    assert isinstance(lazy.state, OnDisk)
    assert list(lazy.state) == list(whole.state)
    assert len(lazy.state) == 2
    assert "0" in lazy.state
    assert "2" not in lazy.state
    assert lazy.settings == whole.settings
    for mine, theirs in ((lazy.state, whole.state), (lazy.trained, whole.trained)):
        assert mine.keys() == theirs.keys()
        for layer, own in theirs.items():
            assert mine[layer].keys() == own.keys()
            assert all(mine[layer][name].equal(tensor) for name, tensor in own.items())
    with pytest.raises(KeyError):
        lazy.state["2"]


def replaced(path: Path) -> None:
    shutil.rmtree(path)
    folder(path, seed=1)


def cut(path: Path) -> None:
    (path / TENSORS).write_bytes((path / TENSORS).read_bytes()[:-8])


@pytest.mark.parametrize(
    ("change", "message"), [(replaced, "was changed while"), (cut, "was changed while"), (shutil.rmtree, "any more")]
)
def test_a_file_that_is_changed_meanwhile_is_refused(
    change: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    path = folder(tmp_path / "adapter")
    stored = read_stored(path, in_memory=False)
    change(path)
    with pytest.raises(CheckpointError, match=message):
        stored.state["0"]


def test_what_was_read_before_a_change_stays_what_it_was(tmp_path: Path) -> None:
    path = folder(tmp_path / "adapter")
    stored = read_stored(path, in_memory=False)
    before = {name: tensor.clone() for name, tensor in stored.state["0"].items()}
    read = stored.state["0"]
    replaced(path)
    assert all(torch.equal(read[name], tensor) for name, tensor in before.items())
