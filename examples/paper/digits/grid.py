"""Pages of pictures, a row for each method, as PNG."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

ENLARGED, GAP, MARGIN = 4, 4, 120
"""How many pixels stand for one; between pictures; for the name of a row."""


def page(rows: dict[str, list[Tensor]], headings: list[str]) -> Image.Image:
    """A row of pictures for each name, in groups (n, 1, 8, 8) under their headings."""
    side = 8 * ENLARGED + GAP
    widths = [len(group) * side + 3 * GAP for group in next(iter(rows.values()))]
    image = Image.new("L", (MARGIN + sum(widths), 16 + side * len(rows)), 255)
    draw = ImageDraw.Draw(image)
    for at, heading in zip(torch.tensor([0, *widths]).cumsum(0).tolist(), headings, strict=False):
        draw.text((MARGIN + at, 2), heading, fill=0)
    for line, (name, groups) in enumerate(rows.items()):
        top, left = 16 + line * side, MARGIN
        draw.text((2, top + side // 3), name, fill=0)
        for group, width in zip(groups, widths, strict=True):
            for place, x in enumerate(enlarged(group)):
                image.paste(Image.fromarray(x.numpy()), (left + place * side, top))
            left += width
    return image


def enlarged(x: Tensor) -> Tensor:
    """Pictures (n, 1, 8, 8) from -1 to 1 as bytes (n, h, w), strokes dark on light, as ink is."""
    ink = ((1 - x.clamp(-1, 1)) * 127.5).round().to(torch.uint8)
    return F.interpolate(ink, scale_factor=ENLARGED).squeeze(1)


def save(image: Image.Image, file: Path) -> None:
    """Write it in as few bytes as PNG allows."""
    image.quantize(64).save(file, optimize=True)
