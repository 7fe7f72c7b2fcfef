"""Images of noise, by their colour, and what a recipe says of a run on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

COLOURS = {"red": 0, "blue": 2}


def picture(label: str, draw: np.random.Generator) -> Image.Image:
    """Noise with more of a colour."""
    pixels = draw.integers(0, 160, (12, 14, 3))
    pixels[..., COLOURS[label]] += 90
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of images named for their labels, under train and test."""
    folder, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, count in (("train", 20), ("test", 6)):
        for label in COLOURS:
            (folder / split / label).mkdir(parents=True)
            for number in range(count):
                picture(label, draw).save(folder / split / label / f"{number}.png")
    return folder


def flags(model: Path, data: Path, output: Path, **more: Any) -> dict[str, Any]:
    """Of a run of four steps."""
    return {
        "model": str(model), "task": "image-classification", "data.train": str(data), "output": str(output),
        "training.max_steps": 4, "training.report_to": "none", "method.rank": 4, **more,
    }  # fmt: skip
