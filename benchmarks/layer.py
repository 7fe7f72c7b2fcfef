"""One `nn.Linear`: a star through (d, r, n) and the cases that the targets name."""

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
class LinearCase:
    """A square Linear, its adapter's rank, the rows of its input, and whether the input wants a gradient."""

    d: int
    rank: int
    rows: int
    grad_input: bool = True
    dtype: str = "float32"
    named: bool = False
    """The targets name this case: more repetitions."""
    d_out: int | None = None
    """Where it is not square."""

    @property
    def title(self) -> str:
        """For the progress line."""
        out = "" if self.d_out is None else f" to {self.d_out}"
        return f"linear {self.d}{out}, r={self.rank}, {self.rows} rows{'' if self.grad_input else ', plain input'}"


NAMED = ((384, 8, 2048), (768, 8, 2048), (2048, 32, 512), (4096, 64, 512))
SLOW = ("peft-hra", "peft-boft")
"""Left out where the input wants no gradient: it makes no difference to their dense products."""

CENTRE_D, CENTRE_RANK, CENTRE_ROWS = 1024, 32, 512


def shapes(options: Options) -> list[tuple[int, int, int]]:
    """(d, r, n) of every case, in order."""
    if options.cuda:
        return [(256, 32, 512)] if options.quick else [(4096, 32, 8192), (4096, 64, 8192), (2048, 32, 8192)]
    if options.quick:
        return [*NAMED[:2], (256, 8, 64), (512, 16, 128)]
    star = [(d, CENTRE_RANK, CENTRE_ROWS) for d in (256, 512, 1024, 2048, 4096)]
    star += [(CENTRE_D, r, CENTRE_ROWS) for r in (8, 16, 64, 128, 256)]
    star += [(CENTRE_D, CENTRE_RANK, n) for n in (64, 128, 256, 1024, 2048, 4096)]
    return [*NAMED, *(shape for shape in star if shape not in NAMED)]


def cases(options: Options) -> Iterator[LinearCase]:
    """Every shape with an input that wants a gradient, as inside a model, and one that does not, as at its start."""
    dtype = "bfloat16" if options.cuda else "float32"
    if options.cuda and not options.quick:
        yield LinearCase(4096, 16, 8192, True, dtype, d_out=14336)
    elif not options.quick:
        yield LinearCase(3072, 48, 512, True, dtype, named=True, d_out=1024)
        yield LinearCase(1536, 32, 768, True, dtype, named=True)
    for shape in shapes(options):
        for grad_input in (True, False):
            yield LinearCase(*shape, grad_input, dtype, shape in NAMED)


def measure(case: LinearCase, options: Options) -> dict[str, Any]:
    """Compare the contenders on one case."""
    dtype = getattr(torch, case.dtype)
    torch.manual_seed(options.seed)
    layer = nn.Linear(case.d, case.d_out or case.d, device=options.device, dtype=dtype)
    x = torch.randn(case.rows, case.d, generator=options.generator()).to(options.device, dtype)
    x.requires_grad_(case.grad_input)
    names = contenders(low_precision=dtype != torch.float32)
    if not case.grad_input or options.cuda:
        names = [name for name in names if name not in SLOW]
    effort = options.effort(3.0 if case.named else 1.0)
    figures, _ = compare(layer, x, case.rank, names, effort, options.device)
    return {"case": asdict(case), "contenders": figures}
