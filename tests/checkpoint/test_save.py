"""Saving is all or nothing, whatever happens meanwhile."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import isotune
from isotune import HRA, LoRA
from isotune.adapters.low_rank.vera import VeRA
from isotune.checkpoint import export, save
from isotune.checkpoint import files as adapter_files
from isotune.checkpoint.files import CARD, CONFIG, OURS, TENSORS
from isotune.checkpoint.parts import stored_parts
from isotune.checkpoint.read import read_stored
from isotune.checkpoint.save import write_parts
from isotune.errors import CheckpointError
from support import adapted, files, minilm, output, stories


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """An adapter folder, with a foreign file and folder in it."""
    folder = isotune.save(adapted(stories(), HRA(rank=2), ["q_proj"], seed=1), tmp_path / "adapter")
    (folder / "notes.txt").write_text("mine")
    (folder / "more").mkdir()
    (folder / "more" / "data.bin").write_bytes(b"\0\1")
    return folder


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def killed(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_saved_folder_holds_config_tensors_and_card(tmp_path: Path) -> None:
    folder = isotune.save(adapted(stories(), HRA(rank=2), ["q_proj"]), tmp_path / "a" / "b", base_model="some/base")
    assert set(files(folder)) == OURS
    assert set(load_file(folder / TENSORS)) == {
        f"base_model.model.model.layers.{i}.self_attn.q_proj.hra_u" for i in range(5)
    }
    assert '"base_model_name_or_path": "some/base"' in (folder / CONFIG).read_text()
    assert 'base_model: "some/base"' in (folder / CARD).read_text()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755


def test_saving_again_replaces_the_adapter_and_keeps_foreign_files(old: Path) -> None:
    model = adapted(stories(), LoRA(rank=3), ["v_proj"])
    isotune.save(model, old)
    assert torch.equal(output(isotune.load(stories(), old).eval()), output(model))
    assert (old / "notes.txt").read_text() == "mine"
    assert (old / "more" / "data.bin").read_bytes() == b"\0\1"
    assert [entry.name for entry in old.parent.iterdir()] == ["adapter"]


WRITES = {
    "tensors": (adapter_files, "save_file"),
    "card": (save, "adapter_card"),
    "sync": (os, "fsync"),
    "putting it in place": (adapter_files, "_put_in_place"),
}


@pytest.mark.parametrize("when", WRITES)
@pytest.mark.parametrize("fault", [full_disk, killed], ids=["full disk", "killed"])
def test_old_adapter_stays_whole_when_saving_fails(old: Path, monkeypatch: Any, when: str, fault: Any) -> None:
    before = files(old)
    model = adapted(stories(), LoRA(rank=3), ["v_proj"])
    monkeypatch.setattr(*WRITES[when], fault)
    with pytest.raises((CheckpointError, KeyboardInterrupt)) as error:
        isotune.save(model, old)
    monkeypatch.undo()
    if fault is full_disk:
        assert isinstance(error.value, CheckpointError)
        assert "No space left on device; nothing there was changed. Free some space" in str(error.value)
    assert files(old) == before
    assert [entry.name for entry in old.parent.iterdir()] == ["adapter"]
    isotune.save(model, old)
    assert files(old) != before


@pytest.mark.parametrize("when", ["tensors", "sync"])
def test_failed_first_save_leaves_nothing_behind(tmp_path: Path, monkeypatch: Any, when: str) -> None:
    model = adapted(stories(), HRA(rank=2), ["q_proj"])
    monkeypatch.setattr(*WRITES[when], full_disk)
    with pytest.raises(CheckpointError, match="No space left on device"):
        isotune.save(model, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_exchange_without_the_systems_help_replaces_the_folder_too(old: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(adapter_files, "_exchange", lambda a, b: False)
    model = adapted(stories(), LoRA(rank=3), ["v_proj"])
    isotune.save(model, old)
    assert torch.equal(output(isotune.load(stories(), old).eval()), output(model))
    assert [entry.name for entry in old.parent.iterdir()] == ["adapter"]


def test_folder_that_is_not_an_adapters_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"holds something else .* name a new folder, or empty this one"):
        isotune.save(adapted(stories(), HRA(rank=2)), tmp_path)
    assert files(tmp_path) == {"thesis.tex": b"years of work"}


def test_file_where_the_folder_should_be_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "adapter").write_text("a file")
    for path in (tmp_path / "adapter", tmp_path / "adapter" / "below"):
        with pytest.raises(CheckpointError, match="cannot write"):
            isotune.save(adapted(stories(), HRA(rank=2)), path)
    assert files(tmp_path) == {"adapter": b"a file"}


def test_parent_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    # As root every folder is writable, so the answer of the system is given here.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(CheckpointError, match="no folder can be made in"):
        isotune.save(adapted(stories(), HRA(rank=2)), tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


def test_which_adapter_to_save_must_be_clear(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no adapter to save; call isotune\.adapt first"):
        isotune.save(stories(), tmp_path / "a")
    model = adapted(adapted(stories(), HRA(rank=2), name="one"), LoRA(rank=2), name="two")
    with pytest.raises(CheckpointError, match="no adapter 'three'; it has: one, two"):
        isotune.save(model, tmp_path / "a", name="three")
    isotune.use(model, "one", "two")
    with pytest.raises(CheckpointError, match="adapters one, two; say which one to save"):
        isotune.save(model, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
    for name in ("one", "two"):
        isotune.save(model, tmp_path / name, name=name)
        expected = output(isotune.use(model, name))
        assert torch.equal(output(isotune.load(stories(), tmp_path / name).eval()), expected)


def test_modules_trained_in_full_and_layers_without_adapters_are_kept_apart(tmp_path: Path) -> None:
    model = adapted(
        minilm(),
        HRA(rank=2),
        ["query"],
        train_also=["pooler"],
        overrides={"layer.0.attention.self.query": {"rank": 4}},
    )
    isotune.save(model, tmp_path / "adapter")
    loaded = isotune.load(minilm(), tmp_path / "adapter", trainable=True)
    ours = {name: p for name, p in model.named_parameters() if p.requires_grad}
    theirs = {name: p for name, p in loaded.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not any(p.requires_grad for p in isotune.load(minilm(), tmp_path / "adapter").parameters())


def test_export_that_fails_leaves_the_old_folder(old: Path, monkeypatch: Any) -> None:
    before = files(old)
    model = adapted(stories(), HRA(rank=4), ["q_proj"])
    monkeypatch.setattr(export, "export_card", full_disk)
    with pytest.raises(CheckpointError, match="nothing there was changed"):
        isotune.export_lora(model, old)
    assert files(old) == before
    assert [entry.name for entry in old.parent.iterdir()] == ["adapter"]


class Odd(nn.Module):
    """Layers of which a stored adapter alone cannot tell everything: groups, and the matrices of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, groups=2)
        self.experts = nn.Module()
        self.experts.up = nn.Parameter(torch.randn(3, 6, 8))
        self.head = nn.Linear(8, 2)


CASES: dict[str, Any] = {
    "hra": (stories, HRA(rank=2, start="anchored"), ["q_proj", "v_proj"], {"overrides": {"v_proj": {"rank": 3}}}),
    "lora": (stories, LoRA(rank=3), ["q_proj"], {"train_also": ["norm"]}),
    "vera": (minilm, VeRA(rank=4), ["query"], {}),
    "only not in peft": (Odd, HRA(rank=2), ["conv", "experts.up"], {"train_also": ["head"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_written_again_without_its_model_is_the_same_to_the_byte(tmp_path: Path, case: str) -> None:
    make, method, targets, options = CASES[case]
    first = isotune.save(adapted(make(), method, targets, **options), tmp_path / "first", base_model="some/base")
    stored = read_stored(first)
    assert stored.header is not None
    parts = {p: (site, stored.settings[p], adapters[0]) for p, site, adapters in stored_parts(stored, None)}
    write_parts(tmp_path / "second", parts, stored.trained, stored.base, sites=stored.header["sites"])
    assert files(tmp_path / "second") == files(first)


def test_what_is_known_to_keep_peft_from_loading_it_is_kept(tmp_path: Path) -> None:
    first = isotune.save(adapted(stories(), HRA(rank=2), ["q_proj"]), tmp_path / "first")
    stored = read_stored(first)
    parts = {p: (site, stored.settings[p], adapters[0]) for p, site, adapters in stored_parts(stored, None)}
    again = read_stored(write_parts(tmp_path / "second", parts, {}, stored.base, refused="strides went missing"))
    assert again.config["peft_type"] == "ISOTUNE_HRA"
    assert "strides went missing" in (tmp_path / "second" / CARD).read_text()
