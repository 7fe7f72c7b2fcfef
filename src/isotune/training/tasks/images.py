"""Classification of images, by models and image processors of transformers."""

from __future__ import annotations

import inspect
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from isotune.errors import IsotuneError, OptionError
from isotune.training.classifiers import head_paths, load_classifier_of
from isotune.training.models import load_image_processor
from isotune.training.tasks.classification import Classification
from isotune.training.tasks.collator import Example
from isotune.training.tasks.contract import named_or_guessed
from isotune.training.tasks.sequences import LABELS

if TYPE_CHECKING:
    from isotune.training.data import Row
    from isotune.training.recipe import DataSettings
    from isotune.training.session import TaskSpec

_INTERPOLATE = "interpolate_pos_encoding"
"""What transformers' models of images take that do not read other sizes than their own unless they are told to."""


class ImageClassification(Classification):
    """One of several labels for an image. Rows of `image` and `label`."""

    slow = ("image",)

    def columns(self, data: DataSettings, found: Sequence[str]) -> dict[str, list[str]]:
        """The image and the label."""
        image = named_or_guessed(data.image, found, ("image", "img", "picture", "file_name", "path"))
        return {"image": image, "label": named_or_guessed(data.label, found, (*LABELS, "fine_label"))}

    def cell(self, key: str, value: Any) -> Any:
        """An image, of a data set's own kind, of bytes, or in a file."""
        return as_image(value) if key == "image" else super().cell(key, value)

    def load(self, spec: TaskSpec) -> tuple[Any, list[str], TaskSpec]:
        """The architecture's own classifier of images; with `image_size` it interpolates its positions to that."""
        model = load_classifier_of("images", spec.model, spec.labels, spec.dtype, spec.quantization)
        _check_size(model, spec)
        if spec.image_size is not None and _INTERPOLATE in inspect.signature(model.forward).parameters:
            model.register_forward_pre_hook(_interpolating, with_kwargs=True)
        return model, head_paths(model), spec

    def processor(self, spec: TaskSpec, model: Any) -> Any:
        """The model's image processor, which scales and normalises."""
        return load_image_processor(spec.model, spec.image_size)

    def collator(self, processor: Any) -> ImageCollator:
        """Images become pixels as they are batched: a whole data set of those would not fit into memory."""
        return ImageCollator(processor)

    def examples(self, rows: Sequence[Row], tokenizer: Any, spec: TaskSpec) -> list[Example]:
        """The images themselves, with their labels as numbers where the rows have labels."""
        return [
            {"image": row["image"], **({"labels": self.number(row["label"], spec)} if "label" in row else {})}
            for row in rows
        ]

    def predicted(self, rows: Sequence[Row], scores: np.ndarray, spec: TaskSpec) -> list[dict[str, Any]]:
        """Each row with its most probable label and that label's probability; of the image its file's name."""
        named = [
            {**row, "image": row["image"].info.get("file") or f"row {number}"}
            for number, row in enumerate(rows, start=1)
        ]
        return super().predicted(named, scores, spec)


class ImageCollator:
    """Makes a batch of images with a model's image processor."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """`pixel_values` (batch, channels, height, width), and `labels` where the examples have some."""
        pixels = self.processor(images=[example["image"] for example in examples], return_tensors="pt")
        batch = {"pixel_values": pixels["pixel_values"]}
        if "labels" in examples[0]:
            batch["labels"] = torch.tensor([example["labels"] for example in examples])
        return batch


def _interpolating(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return given, {_INTERPOLATE: True, **named}


def _check_size(model: Any, spec: TaskSpec) -> None:
    """Raise OptionError where one of timm's models reads images of one size only, and another is asked for."""
    patches = getattr(model.base_model, "patch_embed", None)
    if spec.image_size is None or not getattr(patches, "strict_img_size", False):
        return
    if (own := patches.img_size) != (spec.image_size, spec.image_size):  # type: ignore[union-attr]
        raise OptionError(
            f"data.image_size is {spec.image_size}, but {spec.model} reads {own[0]} x {own[1]} pixels only; "
            'leave it out, or set "dynamic_img_size": true in the model_args of its config.json'
        )


def as_image(value: Any) -> Any:
    """A cell as an RGB image of Pillow's. Raises ValueError where it is none, IsotuneError without Pillow."""
    try:
        from PIL import Image
    except ImportError:
        raise IsotuneError("images take a package to read: pip install 'isotune[vision]'") from None
    try:
        if isinstance(value, dict):
            value = io.BytesIO(value["bytes"]) if value.get("bytes") else value.get("path")
        if isinstance(value, (str, io.BytesIO)):
            with Image.open(value) as opened:
                image = opened.convert("RGB")
            return _named(image, value if isinstance(value, str) else "")
        if isinstance(value, Image.Image):
            return _named(value.convert("RGB"), getattr(value, "filename", ""))
    except (OSError, KeyError, TypeError) as error:
        raise ValueError(f"no image that can be read ({error})") from None
    raise ValueError(f"a {type(value).__name__} and no image")


def _named(image: Any, file: str) -> Any:
    image.info["file"] = file
    return image
