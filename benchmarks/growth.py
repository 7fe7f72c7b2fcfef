"""How the extra cost of our HRA over the frozen layer grows in r, n and d: exponents of a fitted power law."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.options import Options
from benchmarks.single import compare

TAIL = 3
"""Points at the large end that the exponent is fitted to."""


@dataclass(frozen=True)
class GrowthCase:
    """One axis: the values that it takes, and what the other two are."""

    axis: str
    values: tuple[int, ...]
    d: int
    rank: int
    rows: int
    dtype: str = "float32"

    @property
    def title(self) -> str:
        """For the progress line."""
        return f"growth in {self.axis}, {self.values[0]}..{self.values[-1]}"


def cases(options: Options) -> Iterator[GrowthCase]:
    """The three axes. What stays fixed is large enough that the extra cost stands out from the frozen layer's."""
    dtype = "bfloat16" if options.cuda else "float32"
    if options.quick:
        yield GrowthCase("r", (8, 16, 32), 256, 0, 512, dtype)
        yield GrowthCase("n", (256, 512, 1024), 256, 32, 0, dtype)
        yield GrowthCase("d", (128, 256, 512), 0, 32, 512, dtype)
        return
    # n well above r: the r x r algebra, which does not depend on n, would show as a square otherwise.
    yield GrowthCase("r", (8, 16, 32, 64, 128, 256, 512), 1024, 0, 8192, dtype)
    yield GrowthCase("n", (64, 256, 1024, 4096, 8192, 16384), 1024, 64, 0, dtype)
    yield GrowthCase("d", (256, 512, 1024, 2048, 4096), 0, 128, 512, dtype)


def measure(case: GrowthCase, options: Options) -> dict[str, Any]:
    """The extra seconds of forward + backward at every value of the axis, and the exponent at the large end."""
    points = []
    for value in case.values:
        d, rank, rows = (value if case.axis == axis else size for axis, size in _sizes(case).items())
        dtype = getattr(torch, case.dtype)
        torch.manual_seed(options.seed)
        layer = nn.Linear(d, d, device=options.device, dtype=dtype)
        x = torch.randn(rows, d, generator=options.generator()).to(options.device, dtype).requires_grad_()
        names = ("frozen", "isotune-lora", "isotune-hra")
        figures, samples = compare(layer, x, rank, names, options.effort(3.0), options.device)
        base = samples["frozen"].phases["total"]
        extra = {name: paired(samples[name].phases["total"], base) for name in names[1:]}
        points.append({"value": value, "frozen": figures["frozen"]["total"], "extra": extra})
    exponents = {name: exponent([(p["value"], p["extra"][name]) for p in points[-TAIL:]]) for name in names[1:]}
    return {"case": asdict(case), "points": points, "exponents": exponents}


def _sizes(case: GrowthCase) -> dict[str, int]:
    return {"d": case.d, "r": case.rank, "n": case.rows}


def paired(values: Sequence[float], base: Sequence[float]) -> float:
    """The median difference between two contenders' samples of the same round."""
    return statistics.median(v - b for v, b in zip(values, base, strict=False))


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """The slope of log y over log x by least squares; None where noise left fewer than two positive points."""
    logs = [(math.log(x), math.log(y)) for x, y in points if y > 0]
    if len(logs) < 2:
        return None
    return statistics.linear_regression(*zip(*logs, strict=True)).slope
