"""One 3 x 3 `nn.Conv2d`: a few pairs of channels and pixels, as in the stages of a residual network."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.contenders import contenders
from benchmarks.options import Options
from benchmarks.single import compare


@dataclass(frozen=True)
class ConvCase:
    """A 3 x 3 convolution between equal channels on square images."""

    channels: int
    pixels: int
    batch: int
    rank: int
    grad_input: bool = True
    dtype: str = "float32"

    @property
    def title(self) -> str:
        """For the progress line."""
        return f"conv {self.channels} channels, {self.batch} x {self.pixels} x {self.pixels}, r={self.rank}"


SHAPES = ((64, 64, 4, 8), (128, 32, 8, 8), (256, 16, 8, 8), (512, 8, 16, 8), (128, 32, 8, 32), (512, 8, 16, 32))


def cases(options: Options) -> Iterator[ConvCase]:
    """The shapes, each with an input that wants a gradient."""
    dtype = "bfloat16" if options.cuda else "float32"
    for shape in ((64, 8, 2, 8), (64, 16, 2, 8)) if options.quick else SHAPES:
        yield ConvCase(*shape, dtype=dtype)


def measure(case: ConvCase, options: Options) -> dict[str, Any]:
    """Compare the contenders on one case."""
    dtype = getattr(torch, case.dtype)
    torch.manual_seed(options.seed)
    layer = nn.Conv2d(case.channels, case.channels, 3, padding=1, device=options.device, dtype=dtype)
    shape = (case.batch, case.channels, case.pixels, case.pixels)
    x = torch.randn(shape, generator=options.generator()).to(options.device, dtype)
    x.requires_grad_(case.grad_input)
    names = contenders(low_precision=dtype != torch.float32)
    figures, _ = compare(layer, x, case.rank, names, options.effort(), options.device)
    return {"case": asdict(case), "contenders": figures}
