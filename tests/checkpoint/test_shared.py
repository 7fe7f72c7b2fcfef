"""What the adapters of a model share, on disk: stored once or drawn again, for all layers, and checked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import isotune
from both_ways import by_peft, through_peft
from checkpoint.test_hostile import rewrite
from isotune import LoRA
from isotune.bare import bare
from isotune.checkpoint.export_peft import export_peft
from isotune.checkpoint.files import CONFIG, TENSORS
from isotune.diagnostics import diagnose
from isotune.errors import CheckpointError
from isotune.model.names import adapted_layers
from support import DATA, adapted, assert_same_output, assert_unchanged, output, snapshot, stories

LAYERS = ["q_proj", "up_proj", "down_proj"]  # 64 x 64, 172 x 64 and 64 x 172
STORIES = DATA / "stories260k"
METHODS = {
    f"{name} {'stored' if stored else 'drawn again'}": isotune.method(name, rank=6, save_projection=stored, **options)
    for name, options in (("vera", {}), ("randlora", {"legacy_pairing": True}))
    for stored in (True, False)
}
each_method = pytest.mark.parametrize("method", METHODS)
unsaved = pytest.mark.filterwarnings("ignore:Specified to not save:UserWarning")


def trained(method: str) -> nn.Module:
    return adapted(stories(), METHODS[method], LAYERS, size=0.2 if "vera" in method else 0.02)


def shared_keys(folder: Path) -> list[str]:
    return [key for key in load_file(folder / TENSORS) if not key.startswith("base_model.model.")]


@each_method
def test_file_holds_what_is_shared_once_or_not_at_all(method: str, tmp_path: Path) -> None:
    isotune.save(trained(method), tmp_path)
    name = METHODS[method].name
    assert shared_keys(tmp_path) == ([f"base_model.{name}_A", f"base_model.{name}_B"] if "stored" in method else [])


@each_method
def test_export_of_a_folder_one_layer_at_a_time_knows_what_all_layers_share(method: str, tmp_path: Path) -> None:
    model = trained(method)
    isotune.save(model, tmp_path / "adapter")
    export = isotune.export_lora(tmp_path / "adapter", tmp_path / "lora", base=STORIES)
    assert export.residual < 1e-5
    assert_same_output(output(isotune.load(stories(), tmp_path / "lora").eval()), output(model))
    inspection = diagnose(tmp_path / "adapter", STORIES)
    layers = dict(adapted_layers(model))
    assert len(inspection.sites) == 15
    for row in inspection.sites:
        layer = layers[row.site]
        W, changed = bare(layer, "weight").detach(), layer.weight.detach()
        assert row.change_norm == pytest.approx(float((changed - W).norm() / W.norm()), rel=1e-4)
    isotune.save(model, tmp_path / "adapter", base_model="no/such-base")
    assert diagnose(tmp_path / "adapter").sites[0].change_norm is None


@unsaved
@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("kind", [peft.VeraConfig, peft.RandLoraConfig])
def test_export_of_a_folder_of_pefts_takes_the_sizes_of_its_layers_from_the_base(
    kind: Any, save: bool, tmp_path: Path
) -> None:
    theirs = by_peft(stories(), kind(r=6, save_projection=save, target_modules=LAYERS), tmp_path / "theirs")
    isotune.export_lora(tmp_path / "theirs", tmp_path / "lora", base=STORIES)
    assert_same_output(output(isotune.load(stories(), tmp_path / "lora").eval()), output(theirs))
    config = tmp_path / "theirs" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(STORIES), "no/such-base"))
    with pytest.raises(CheckpointError, match="does not say how large its layers are"):
        diagnose(tmp_path / "theirs")


@each_method
def test_export_in_pefts_own_layout_keeps_what_is_shared(method: str, tmp_path: Path) -> None:
    model = trained(method)
    isotune.save(model, tmp_path / "adapter")
    export_peft(tmp_path / "adapter", tmp_path / "theirs")
    assert_same_output(output(through_peft(stories(), tmp_path / "theirs")), output(model))


def shared_of(model: nn.Module) -> dict[str, Tensor]:
    return next(layer.isotune["default"].shared.tensors() for _, layer in adapted_layers(model))


def test_loading_weights_takes_over_what_is_stored(tmp_path: Path) -> None:
    model = trained("vera stored")
    # As from another version of torch, which drew other numbers.
    shared_of(model)["vera_A"].mul_(1.5)
    isotune.save(model, tmp_path)
    other = trained("vera stored")
    assert not torch.allclose(output(other), output(model), atol=1e-3)
    isotune.load_weights(other, tmp_path)
    assert torch.equal(output(other), output(model))
    assert torch.equal(output(isotune.load(stories(), tmp_path).eval()), output(model))


def test_layers_of_two_dtypes_have_a_copy_each() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 5).double(), nn.Linear(5, 3))
    isotune.adapt(model, isotune.method("vera", rank=3), ["0", "1", "2"])
    first, second, third = (layer.isotune["default"].shared for _, layer in adapted_layers(model))
    assert first is third
    assert second["vera_A"].dtype == torch.float64
    assert torch.equal(first["vera_A"].double(), second["vera_A"])


Change = Callable[[dict[str, Tensor], dict[str, Any]], None]
DAMAGE: dict[str, tuple[Change, str]] = {
    "missing": (
        lambda t, h: [t.pop("base_model.vera_A"), t.pop("base_model.vera_B")],
        "is incomplete: what vera shares among all layers is missing",
    ),
    "one missing": (lambda t, h: t.pop("base_model.vera_A"), "what it shares: missing vera_A"),
    "too small": (
        lambda t, h: t.update({"base_model.vera_A": torch.zeros(6, 100)}),
        r"down_proj', what it shares: vera_A has shape \(6, 100\), expected \(6, 172\)",
    ),
    "other rank": (
        lambda t, h: t.update({"base_model.vera_B": torch.zeros(172, 5)}),
        r"vera_B has shape \(64, 5\), expected \(64, 6\)",
    ),
    "a vector": (lambda t, h: t.update({"base_model.vera_A": torch.zeros(6)}), "does not fit this model"),
    "one too many": (lambda t, h: t.update({"base_model.vera_C": torch.zeros(1)}), "unexpected vera_C"),
    "a strange name": (lambda t, h: t.update({"base_model.a.b": torch.zeros(1)}), "does not fit this model"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused_and_the_model_is_left_alone(damage: str, tmp_path: Path) -> None:
    isotune.save(trained("vera stored"), tmp_path)
    change, message = DAMAGE[damage]
    rewrite(tmp_path, change)
    model = stories()
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=message):
        isotune.load(model, tmp_path)
    assert_unchanged(model, before)
    with pytest.raises(CheckpointError):
        isotune.load_weights(trained("vera stored"), tmp_path)
    with pytest.raises(CheckpointError):
        isotune.export_lora(tmp_path, tmp_path / "lora", base=STORIES)


def test_method_that_shares_nothing_refuses_what_a_file_holds_for_all_layers(tmp_path: Path) -> None:
    isotune.save(adapted(stories(), LoRA(rank=4), LAYERS), tmp_path)
    rewrite(tmp_path, lambda tensors, header: tensors.update({"base_model.vera_A": torch.zeros(4, 64)}))
    with pytest.raises(CheckpointError, match="holds vera_A, which its lora adapter does not store"):
        isotune.load(stories(), tmp_path)


def test_pefts_copies_with_each_layer_must_be_what_all_share(tmp_path: Path) -> None:
    by_peft(stories(), peft.RandLoraConfig(r=6, target_modules=LAYERS), tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    tensors["base_model.model.model.layers.1.self_attn.q_proj.randlora_A"] += 1
    save_file(tensors, tmp_path / TENSORS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.q_proj\.randlora_A', which differs from what"):
        isotune.load(stories(), tmp_path)


def test_settings_that_differ_between_layers_cannot_be_drawn_again(tmp_path: Path) -> None:
    isotune.save(trained("vera drawn again"), tmp_path)

    other = METHODS["vera drawn again"].model_dump(exclude_defaults=True) | {"projection_seed": 5}
    rewrite(tmp_path, lambda tensors, header: next(iter(header["sites"].values())).update(settings=other))
    for read in (
        lambda: isotune.load(stories(), tmp_path),
        lambda: isotune.export_lora(tmp_path, tmp_path / "lora", base=STORIES),
    ):
        with pytest.raises(CheckpointError, match="overrides cannot give some of them other options"):
            read()


def test_config_says_whether_the_shared_tensors_are_stored(tmp_path: Path) -> None:
    isotune.save(trained("vera drawn again"), tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["save_projection"] is False
