"""Adapter folders that are damaged, foreign or made for something else: one clear error, and nothing is changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import isotune
from isotune import HRA, LoRA
from isotune.checkpoint.files import CONFIG, TENSORS, digest
from isotune.errors import CheckpointError
from support import adapted, assert_unchanged, files, output, snapshot, stories

KEY = "base_model.model.model.layers.2.self_attn.q_proj.hra_u"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound adapter of the small Llama."""
    folder = tmp_path_factory.mktemp("good") / "adapter"
    return isotune.save(adapted(stories(), HRA(rank=4), ["q_proj"], train_also=["model.norm"]), folder)


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    copy = tmp_path / "adapter"
    copy.mkdir()
    for name, content in files(good).items():
        (copy / name).write_bytes(content)
    return copy


def rewrite(folder: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None], sign: bool = True) -> None:
    """Change tensors and header; with `sign` the digest is made to fit again, as by someone who knows the format."""
    file = folder / TENSORS
    tensors = load_file(file)
    with safe_open(file, framework="pt") as opened:
        header = json.loads(opened.metadata()["isotune"])
    change(tensors, header)
    if sign:
        header["digest"] = digest(tensors)
    save_file(tensors, file, metadata={"format": "pt", "isotune": json.dumps(header)})


def edit_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **fields}))


def truncate(folder: Path) -> None:
    content = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(content[: len(content) // 2])


def flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / TENSORS).read_bytes())
    content[-3] ^= 1
    (folder / TENSORS).write_bytes(content)


def pickle_bomb(folder: Path) -> None:
    torch.save({"a": torch.ones(1)}, folder / TENSORS)


def huge_header(folder: Path) -> None:
    (folder / TENSORS).write_bytes((2**40).to_bytes(8, "little") + b"{}")


def nan(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
    tensors[KEY][3, 1] = float("nan")


def nudge(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
    tensors[KEY][0, 0] += 1e-3


def sites_of_numbers(_: dict[str, Tensor], header: dict[str, Any]) -> None:
    header["sites"] = dict.fromkeys(header["sites"], 3)


def infinite_head(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
    tensors["base_model.model.model.norm.weight"][0] = float("inf")


SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (truncate, "is truncated or no safetensors file"),
    "empty file": (lambda f: (f / TENSORS).write_bytes(b""), "is truncated or no safetensors file"),
    "one bit flipped": (flip_a_bit, "do not match their digest: the file was damaged or altered"),
    "a pickle": (pickle_bomb, "no safetensors file"),
    "an absurd header length": (huge_header, "no safetensors file"),
    "pickled tensors": (
        lambda f: (f / TENSORS).rename(f / "adapter_model.bin"),
        r"adapter_model.bin, a pickle, and pickles are not read.*Convert it once: safetensors\.torch\.save_file",
    ),
    "no tensors": (lambda f: (f / TENSORS).unlink(), f"holds no {TENSORS}; the folder is incomplete"),
    "no config": (lambda f: (f / CONFIG).unlink(), f"is no adapter folder: it holds no {CONFIG}"),
    "config is no JSON": (lambda f: (f / CONFIG).write_text("{"), "cannot be read"),
    "config is a list": (lambda f: (f / CONFIG).write_text("[]"), "names no peft_type"),
    "config of another method": (lambda f: edit_config(f, peft_type="LORA"), "the folder mixes two adapters"),
    "config of an unknown method": (lambda f: edit_config(f, peft_type="MAGIC"), "'MAGIC'"),
    "a key missing": (lambda f: rewrite(f, lambda t, h: t.__delitem__(KEY)), "no tensors for 'model.layers.2"),
    "a key left over": (
        lambda f: rewrite(f, lambda t, h: t.update({"base_model.model.extra.hra_u": torch.ones(1)})),
        "'base_model.model.extra.hra_u', which belongs to no layer",
    ),
    "a second tensor at a layer": (
        lambda f: rewrite(f, lambda t, h: t.update({KEY + "_too": torch.ones(1)})),
        "unexpected hra_u_too",
    ),
    "a tensor under another name": (
        lambda f: rewrite(f, lambda t, h: t.update({KEY[:-1] + "v": t.pop(KEY)})),
        "missing hra_u",
    ),
    "a head's tensor missing": (
        lambda f: rewrite(f, lambda t, h: t.__delitem__("base_model.model.model.norm.weight")),
        "missing weight",
    ),
    "a wrong shape": (
        lambda f: rewrite(f, lambda t, h: t.update({KEY: t[KEY][:, :3].clone()})),
        r"hra_u has shape \(64, 3\), expected \(64, 4\)",
    ),
    "NaN": (lambda f: rewrite(f, nan), "not finite"),
    "infinity in a head": (lambda f: rewrite(f, infinite_head), "not finite"),
    "altered without a new digest": (
        lambda f: rewrite(f, nudge, sign=False),
        "digest",
    ),
    "header without fields": (lambda f: rewrite(f, lambda t, h: h.clear()), "header .* is damaged"),
    "header of another kind": (
        lambda f: rewrite(f, lambda t, h: h.update(sites=[1, 2])),
        "no layer that its header names",
    ),
    "sites that are no objects": (
        lambda f: rewrite(f, sites_of_numbers),
        "dam",
    ),
    "settings that do not exist": (
        lambda f: rewrite(f, lambda t, h: h.update(settings={"rnk": 4})),
        "no option 'rnk'",
    ),
    "a method that does not exist": (
        lambda f: rewrite(f, lambda t, h: h.update(method="magic")),
        "unknown method 'magic'",
    ),
    "a later format": (lambda f: rewrite(f, lambda t, h: h.update(format=99)), "format version 99.*upgrade isotune"),
}


@pytest.mark.parametrize("how", SPOILT)
@pytest.mark.parametrize("existing", [False, True], ids=["bare model", "adapted model"])
def test_spoilt_folder_is_refused_in_one_clear_message_and_nothing_changes(
    folder: Path, how: str, existing: bool
) -> None:
    spoil, said = SPOILT[how]
    spoil(folder)
    model = stories()
    if existing:
        adapted(model, LoRA(rank=2), name="other")
    before, on_disk = snapshot(model), files(folder)
    with pytest.raises(CheckpointError, match=said):
        isotune.load(model, folder)
    assert_unchanged(model, before)
    assert files(folder) == on_disk


def test_header_that_is_no_json_is_refused(folder: Path) -> None:
    save_file(load_file(folder / TENSORS), folder / TENSORS, metadata={"isotune": "{"})
    with pytest.raises(CheckpointError, match=r"header of .* is damaged"):
        isotune.load(stories(), folder)


@pytest.mark.parametrize("name", ["nowhere", "file"])
def test_path_that_is_no_folder_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("no adapter")
    with pytest.raises(CheckpointError, match="there is no adapter folder"):
        isotune.load(stories(), tmp_path / name)


def test_base_with_other_layers_or_shapes_is_refused(good: Path) -> None:
    other = nn.Sequential(nn.Linear(4, 4))
    before = snapshot(other)
    with pytest.raises(CheckpointError, match=r"for another base: this model has no layer 'model\.layers\.0"):
        isotune.load(other, good)
    assert_unchanged(other, before)
    wide = stories()
    wide.model.layers[3].self_attn.q_proj = nn.Linear(64, 65)
    before = snapshot(wide)
    for force in (False, True):
        with pytest.raises(CheckpointError, match=r"q_proj' was \[64, 64\].* there and is \[65, 64\] here"):
            isotune.load(wide, good, force=force)
    assert_unchanged(wide, before)


def test_base_with_another_config_is_refused_with_each_field_unless_forced(good: Path) -> None:
    model = stories()
    saved, model.config.rms_norm_eps, model.config.vocab_size = model.config.rms_norm_eps, 1e-3, 67
    before = snapshot(model)
    said = rf"another base, rms_norm_eps: 0.001 here, {saved} saved; vocab_size: 67 here, 512 saved\. .*force=True"
    with pytest.raises(CheckpointError, match=said):
        isotune.load(model, good)
    assert_unchanged(model, before)
    model.config.vocab_size = 512
    assert torch.equal(
        output(isotune.load(model, good, force=True).eval()), output(isotune.load(stories(), good).eval())
    )


@pytest.mark.parametrize(
    "field",
    [("use_cache", False), ("_name_or_path", "elsewhere"), ("pad_token_id", 7), ("attention_dropout", 0.1),
     ("output_hidden_states", True), ("max_position_embeddings", 128), ("a_field_of_a_later_transformers", None)],
)  # fmt: skip
def test_a_field_that_says_nothing_of_the_weights_does_not_make_another_base(
    good: Path, field: tuple[str, object]
) -> None:
    model = stories()
    setattr(model.config, *field)
    assert isotune.load(model, good) is model


def test_a_name_that_is_taken_is_refused_and_the_adapter_there_stays(good: Path) -> None:
    model = adapted(stories(), LoRA(rank=2))
    before = snapshot(model)
    with pytest.raises(isotune.IsotuneError, match="already has an adapter 'default'"):
        isotune.load(model, good)
    assert_unchanged(model, before)


def test_values_for_an_adapter_that_differs_in_more_than_values_are_refused(good: Path) -> None:
    model = adapted(stories(), HRA(rank=2), ["q_proj"])
    before = snapshot(model)
    with pytest.raises(CheckpointError, match="was not saved from the adapter 'default' as it is on this model"):
        isotune.load_weights(model, good)
    assert_unchanged(model, before)
