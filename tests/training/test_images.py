"""Images are classified: from folders and Parquet to the run, its evaluation, its predictions and its export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from coloured import COLOURS, flags, picture
from fsspec.implementations.local import LocalFileSystem

from isotune.errors import DataError, IsotuneError
from isotune.training.data import load_splits
from isotune.training.evaluation import evaluate
from isotune.training.export import export_merged
from isotune.training.models import load_image_processor
from isotune.training.prediction import predict
from isotune.training.recipe import DataSettings, build_recipe
from isotune.training.run import train
from isotune.training.session import Session, TaskSpec
from isotune.training.tasks import images


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer vision transformer for images of 16 x 16."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=16, patch_size=4
    )
    transformers.ViTModel(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def test_a_run_on_folders_of_images_goes_to_its_export(vit: Path, pictures: Path, tmp_path: Path) -> None:
    result = train(
        build_recipe(None, flags(vit, pictures, tmp_path / "run", **{"data.test": "test"})), progress=False
    )
    assert result.metrics["test_accuracy"] > 0.9
    assert result.metrics["test_majority_accuracy"] == 0.5
    assert {"test_probe_accuracy", "seconds_per_step"} <= result.metrics.keys()
    assert result.metrics["tokens_per_second"] is None
    again = evaluate(result.output, progress=False)
    assert again["loss"] == pytest.approx(result.metrics["test_loss"], rel=1e-5)
    merged = export_merged(result.adapter, tmp_path / "merged")
    assert evaluate(merged, str(pictures), progress=False)["loss"] == pytest.approx(again["loss"], rel=1e-4)
    told = transformers.pipeline("image-classification", str(merged))(str(pictures / "test" / "red" / "0.png"))
    assert {one["label"] for one in told} == COLOURS.keys()


def test_a_convolutional_net_keeps_its_running_statistics_and_its_head_is_a_sequence(
    pictures: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    base = transformers.ResNetModel(config)
    base.save_pretrained(tmp_path / "model")
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "model")
    asked = {"targets": ".*convolution", "data.test": "test"}
    recipe = build_recipe(None, flags(tmp_path / "model", pictures, tmp_path / "run", **asked))
    result = train(recipe, progress=False)
    assert result.model.isotune_head.trained == ["classifier"]  # a Flatten and a Linear
    statistics = {name: t for name, t in result.model.resnet.named_buffers() if "running" in name}
    assert len(statistics) >= 6
    for name, buffer in base.named_buffers():
        assert "running" not in name or torch.equal(statistics[name], buffer), name
    again = evaluate(result.output, progress=False)
    assert again["loss"] == pytest.approx(result.metrics["test_loss"], rel=1e-5)


def test_predictions_name_the_images_and_need_no_labels(vit: Path, pictures: Path, tmp_path: Path) -> None:
    result = train(build_recipe(None, flags(vit, pictures, tmp_path / "run")), progress=False)
    files = sorted(str(file) for file in (pictures / "test").rglob("*.png"))
    (tmp_path / "bare.jsonl").write_text("".join(json.dumps({"path": file}) + "\n" for file in files))
    lines = tmp_path / "told.jsonl"
    assert predict(result.output, str(tmp_path / "bare.jsonl"), lines, progress=False) == 12
    told = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [one["image"] for one in told] == files
    assert sum(one["prediction"] == Path(one["image"]).parent.name for one in told) > 9
    assert predict(result.output, str(pictures / "test" / "red"), lines, batch_size=1, progress=False) == 6
    told = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [one["image"] for one in told] == sorted(str(file) for file in (pictures / "test" / "red").iterdir())


def test_parquet_with_images_in_it_gives_the_same_images(pictures: Path, tmp_path: Path) -> None:
    found = load_splits(DataSettings(train=str(pictures), validation=None), "image-classification", 0)
    bytes_of = [
        {"image": {"bytes": Path(row["image"].info["file"]).read_bytes(), "path": None}, "label": row["label"]}
        for row in found.train
    ]
    datasets.Dataset.from_list(bytes_of).to_parquet(tmp_path / "x.parquet")
    again = load_splits(DataSettings(train=str(tmp_path / "x.parquet"), validation=None), "image-classification", 0)
    assert len(again.train) == len(found.train) == 40
    for one, other in zip(found.train, again.train, strict=True):
        assert one["label"] == other["label"]
        assert np.array_equal(np.asarray(one["image"]), np.asarray(other["image"]))


@pytest.mark.parametrize("typed", [False, True])
def test_rows_that_are_left_out_are_not_decoded(
    typed: bool, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sorted((pictures / "train").rglob("*.png"))
    held = [{"image": {"bytes": file.read_bytes(), "path": None}, "label": file.parent.name} for file in files]
    table = datasets.Dataset.from_list(held)
    (table.cast_column("image", datasets.Image()) if typed else table).to_parquet(tmp_path / "x.parquet")
    data = DataSettings(train=str(tmp_path / "x.parquet"), validation=0.5, max_train_rows=3, max_eval_rows=2)
    decoded = {"cells": 0, "features": 0}

    def counting(name: str, function: Any) -> Any:
        def counted(*args: Any, **kwargs: Any) -> Any:
            decoded[name] += 1
            return function(*args, **kwargs)

        return counted

    monkeypatch.setattr(images, "as_image", counting("cells", images.as_image))
    monkeypatch.setattr(datasets.Image, "decode_example", counting("features", datasets.Image.decode_example))
    few = load_splits(data, "image-classification", 0)
    assert (len(few.train), len(few.validation)) == (3, 2)
    assert decoded == {"cells": 5, "features": 5 if typed else 0}
    every = load_splits(data.model_copy(update={"max_train_rows": None}), "image-classification", 0)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))[:3]
    for one, place in zip(few.train, order, strict=True):
        assert np.array_equal(np.asarray(one["image"]), np.asarray(every.train[place]["image"]))


def test_an_image_that_cannot_be_read_is_named_by_its_row(pictures: Path, tmp_path: Path) -> None:
    files = sorted((pictures / "train").rglob("*.png"))
    held = [{"image": {"bytes": file.read_bytes(), "path": None}, "label": file.parent.name} for file in files]
    held[4]["image"]["bytes"] = b"no image"
    datasets.Dataset.from_list(held).to_parquet(tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x.parquet: row 5 has no image that can be read .* in column 'image'"):
        load_splits(DataSettings(train=str(tmp_path / "x.parquet")), "image-classification", 0)


def test_a_folder_of_images_may_name_its_splits_or_have_none(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "named").mkdir()
    for split, name in (("train", "my train [1]"), ("test", "Testing")):
        shutil.copytree(pictures / split, tmp_path / "named" / name)
    data = DataSettings(train=str(tmp_path / "named"), validation=None, test="test")
    named = load_splits(data, "image-classification", 0)
    assert (len(named.train), len(named.test)) == (40, 12)
    whole = load_splits(DataSettings(train=str(pictures / "train"), validation=None), "image-classification", 0)
    assert [row["label"] for row in whole.train] == [row["label"] for row in named.train]
    assert [row["label"] for row in whole.train].count("red") == 20


def test_a_folder_of_images_is_looked_through_a_few_times_only(
    pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    info = LocalFileSystem.info

    def counted(self: LocalFileSystem, path: Any, **more: Any) -> Any:
        asked.append(path)
        return info(self, path, **more)

    monkeypatch.setattr(LocalFileSystem, "info", counted)
    found = load_splits(DataSettings(train=str(pictures), validation=None, test="test"), "image-classification", 0)
    assert len(found.train + found.test) == 52
    assert len(asked) < 6 * 52  # and not 45 times


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("no image")
    for value, message in ((str(tmp_path / "x.png"), "no image that can be read"), (3, "a int and no image")):
        rows = [json.dumps({"image": value, "label": label}) for label in "ab"]
        (tmp_path / "x.jsonl").write_text("\n".join(rows))
        with pytest.raises(DataError, match=rf"row 1 has {message}.* in column 'image'"):
            load_splits(DataSettings(train=str(tmp_path / "x.jsonl"), validation=None), "image-classification", 0)


def test_a_model_of_texts_classifies_no_images(bert: Path, pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(IsotuneError, match="transformers has no class of bert models that classifies images"):
        train(build_recipe(None, flags(bert, pictures, tmp_path / "run")), progress=False)


def test_images_have_the_size_of_the_recipe(vit: Path, pictures: Path, tmp_path: Path) -> None:
    recipe = build_recipe(
        None, flags(vit, pictures, tmp_path / "run", **{"data.image_size": 24, "data.test": "test"})
    )
    result = train(recipe, progress=False)
    session = Session(TaskSpec.read(result.adapter))
    batch = session.collator([{"image": picture("red", np.random.default_rng(0))}])
    assert batch["pixel_values"].shape == (1, 3, 24, 24)  # 6 x 6 patches, where the model has positions for 4 x 4
    again = evaluate(result.output, progress=False)
    assert again["loss"] == pytest.approx(result.metrics["test_loss"], rel=1e-5)
    merged = export_merged(result.adapter, tmp_path / "merged")
    assert evaluate(merged, str(pictures), progress=False)["loss"] == pytest.approx(again["loss"], rel=1e-4)


def test_an_image_of_a_given_size_is_whole(tmp_path: Path) -> None:
    transformers.ViTConfig().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    said = {
        "image_processor_type": "BitImageProcessor", "do_resize": True, "size": {"shortest_edge": 32},
        "do_center_crop": True, "crop_size": {"height": 16, "width": 16}, "do_normalize": False, "do_rescale": True,
    }  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    edges = np.zeros((60, 120, 3), np.uint8)
    edges[:, :40], edges[:, 80:] = 255, 255
    own, given = (
        torch.tensor(np.array(load_image_processor(str(tmp_path), size)(images=[edges])["pixel_values"]))
        for size in (None, 12)
    )
    assert own.shape == (1, 3, 16, 16)
    assert own[..., 4:12].max() < 0.1
    assert given.shape == (1, 3, 12, 12)
    assert given[..., [0, 1, 10, 11]].min() > 0.9
    assert given[..., 5:7].max() < 0.1
