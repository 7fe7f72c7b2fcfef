"""timm's models, through transformers' wrapper, classify images; skipped without timm and torchvision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from coloured import COLOURS, flags
from PIL import Image

import isotune
from isotune.errors import IsotuneError, OptionError
from isotune.model.targets import find_targets
from isotune.training.classifiers import load_classifier_of
from isotune.training.evaluation import evaluate
from isotune.training.export import export_merged
from isotune.training.models import load_image_processor
from isotune.training.recipe import build_recipe
from isotune.training.run import train

pytest.importorskip("torchvision", reason="timm imports it: pip install 'isotune[timm]'")
pytest.importorskip("timm", reason="pip install 'isotune[timm]'")

MODELS: dict[str, dict[str, Any]] = {
    "resnet18": {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16), "stem_width": 8},
    "vit_tiny_patch16_224": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
    "convnext_tiny": {"depths": (1, 1, 2, 1), "dims": (8, 8, 16, 16)},
}
OF_RESNET = r".*layer\d.*conv\d"


def saved(folder: Path, architecture: str, **more: Any) -> Path:
    """A tiny random model of five classes, named a to e, for images of 32 x 32, as the hub has timm's."""
    seen = {
        "input_size": [3, 32, 32],
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bilinear",
        "crop_pct": 1,
    }
    said = {
        "architecture": architecture, "num_classes": 5, "label_names": [*"abcde"], "pretrained_cfg": seen,
        "model_args": {**MODELS.get(architecture, {}), **more},
    }  # fmt: skip
    torch.manual_seed(0)
    config = transformers.TimmWrapperConfig.from_dict(said)
    transformers.TimmWrapperForImageClassification(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("architecture", "more"),
    [
        ("resnet18", {"targets": OF_RESNET}),
        ("vit_tiny_patch16_224", {}),
        ("convnext_tiny", {"targets": "all-linear", "method.name": "lora"}),
    ],
)
def test_a_run_goes_to_its_export(architecture: str, more: dict[str, Any], pictures: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", architecture)
    recipe = build_recipe(None, flags(folder, pictures, tmp_path / "run", **{"data.test": "test"}, **more))
    result = train(recipe, progress=False)
    assert result.metrics["test_accuracy"] > 0.9
    assert "test_probe_accuracy" in result.metrics
    assert evaluate(result.output, progress=False)["loss"] == pytest.approx(result.metrics["test_loss"], rel=1e-5)
    merged = export_merged(result.adapter, tmp_path / "merged")
    again = evaluate(merged, str(pictures), progress=False)
    assert again["loss"] == pytest.approx(result.metrics["test_loss"], rel=1e-3)
    plain = transformers.AutoModelForImageClassification.from_pretrained(merged)
    assert [*plain.config.id2label.values()] == sorted(COLOURS)
    told = transformers.pipeline("image-classification", str(merged))(str(pictures / "test" / "red" / "0.png"))
    assert max(told, key=lambda one: one["score"])["label"] == "red"


def test_a_head_for_as_many_labels_is_drawn_anew_and_everything_below_it_is_the_models(tmp_path: Path) -> None:
    folder = saved(tmp_path, "resnet18")
    model = _opened(folder, ["x", "y"])
    assert model.isotune_head == ("timm_model.fc", ["timm_model.fc"])
    assert model.timm_model.fc.weight.shape == (2, 16)
    own = transformers.AutoModelForImageClassification.from_pretrained(folder).state_dict()
    for name, tensor in model.state_dict().items():
        assert name.startswith("timm_model.fc.") or torch.equal(tensor, own[name]), name


def test_a_model_of_the_hub_is_asked_for_by_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = tmp_path / "models--timm--resnet18.a1_in1k"
    folder = saved(held / "snapshots" / "0a1b", "resnet18")
    (held / "refs").mkdir()
    (held / "refs" / "main").write_text("0a1b")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))  # what was downloaded before
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model = load_classifier_of("images", "timm/resnet18.a1_in1k", ["x", "y"])
    assert model.timm_model.fc.weight.shape == (2, 16)
    own = transformers.AutoModelForImageClassification.from_pretrained(folder).state_dict()
    name = "timm_model.layer1.0.conv1.weight"
    assert torch.equal(model.state_dict()[name], own[name])
    assert load_image_processor("timm/resnet18.a1_in1k", None).data_config["input_size"][-1] == 32
    with pytest.raises(IsotuneError, match="timm/resnet34: not a model folder here, nor a model the hub gave"):
        load_classifier_of("images", "timm/resnet34", ["x", "y"])


def test_a_backbone_with_missing_weights_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, "resnet18")
    said = json.loads((tmp_path / "config.json").read_text())
    said["model_args"]["layers"] = [1, 1, 1, 2]
    (tmp_path / "config.json").write_text(json.dumps(said))
    with pytest.raises(IsotuneError, match=r"the weights lack .* of the model's tensors"):
        _opened(folder, ["x", "y"])


def test_an_architecture_with_two_heads_is_refused(tmp_path: Path) -> None:
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    folder = saved(tmp_path, "deit_tiny_distilled_patch16_224", **small)
    with pytest.raises(IsotuneError, match="VisionTransformerDistilled classifies by several heads"):
        _opened(folder, ["x", "y"])


def test_presets_know_the_blocks_of_a_vision_transformer(tmp_path: Path) -> None:
    model = _opened(saved(tmp_path, "vit_tiny_patch16_224"), ["x", "y"])
    base = "timm_model.blocks."
    found = {preset: [*find_targets(model, preset, kinds={"block"})] for preset in ("attention", "mlp", "blocks")}
    assert found == {
        "attention": [f"{base}0.attn", f"{base}1.attn"],
        "mlp": [f"{base}0.mlp", f"{base}1.mlp"],
        "blocks": [f"{base}0", f"{base}1"],
    }
    layers = [*find_targets(model, "all-linear")]
    assert layers == [f"{base}{i}.{name}" for i in (0, 1) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    isotune.adapt(model, isotune.method("adaptformer", rank=2))
    assert [row.site for row in isotune.describe(model)] == found["mlp"]


def test_images_are_stretched_to_the_size_of_the_recipe(tmp_path: Path) -> None:
    folder = saved(tmp_path, "resnet18")
    edges = np.zeros((60, 120, 3), np.uint8)
    edges[:, :20], edges[:, 100:] = 255, 255
    own, given = (
        load_image_processor(str(folder), size)(images=[Image.fromarray(edges)], return_tensors="pt")["pixel_values"]
        for size in (None, 12)
    )
    assert own.shape == (1, 3, 32, 32)
    assert own.max() < -0.9  # the middle alone, where a half is subtracted and divided by
    assert given.shape == (1, 3, 12, 12)
    assert given[..., [0, 11]].min() > 0.9


def test_a_transformer_takes_the_size_of_the_recipe_where_its_config_lets_it(pictures: Path, tmp_path: Path) -> None:
    fixed = saved(tmp_path / "fixed", "vit_tiny_patch16_224")
    any_size = saved(tmp_path / "any", "vit_tiny_patch16_224", dynamic_img_size=True)
    sized = {"data.image_size": 48, "data.test": "test"}
    with pytest.raises(OptionError, match=r"data\.image_size is 48, but .* reads 32 x 32 pixels only"):
        train(build_recipe(None, flags(fixed, pictures, tmp_path / "no", **sized)), progress=False)
    result = train(build_recipe(None, flags(any_size, pictures, tmp_path / "run", **sized)), progress=False)
    assert evaluate(result.output, progress=False)["loss"] == pytest.approx(result.metrics["test_loss"], rel=1e-5)


def _opened(folder: Path, labels: list[str]) -> Any:
    return load_classifier_of("images", str(folder), labels)
