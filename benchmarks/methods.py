"""Every registered method on one `nn.Linear`, with PEFT's own implementation beside it where PEFT has the method."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.contenders import PEFTS, REFERENCE, peft_form, settings_of
from benchmarks.options import Options
from benchmarks.single import compare
from isotune.adapters.registry import method_class, method_names
from isotune.errors import IsotuneError
from isotune.model.catalogue import linear_site


@dataclass(frozen=True)
class MethodCase:
    """A square Linear and a method: of this rank where it has one, at its other defaults."""

    method: str
    d: int = 1024
    rank: int = 16
    rows: int = 512
    dtype: str = "float32"

    @property
    def title(self) -> str:
        """For the progress line."""
        return f"{self.method} on linear {self.d}, {self.rows} rows"


def names() -> list[str]:
    """The methods that adapt a linear layer."""
    return [name for name in method_names() if "linear" in method_class(name).kinds]


def cases(options: Options) -> Iterator[MethodCase]:
    """One for each method."""
    dtype = "bfloat16" if options.cuda else "float32"
    for name in names():
        yield MethodCase(name, d=256, rows=64, dtype=dtype) if options.quick else MethodCase(name, dtype=dtype)


def measure(case: MethodCase, options: Options) -> dict[str, Any]:
    """Compare a method with PEFT's form of it, with PEFT's LoRA of the same rank and with the frozen layer."""
    dtype = getattr(torch, case.dtype)
    torch.manual_seed(options.seed)
    layer = nn.Linear(case.d, case.d, device=options.device, dtype=dtype)
    x = torch.randn(case.rows, case.d, generator=options.generator()).to(options.device, dtype).requires_grad_()
    names = ["frozen", REFERENCE, f"isotune-{case.method}"]
    trained = None
    try:
        settings = settings_of(case.method, case.rank)
        trained = settings.parameter_count(linear_site(case.d, case.d))
        if peft_form(settings) is not None:
            names.append(f"{PEFTS}{case.method}")
    except IsotuneError:
        pass  # the comparison says why
    figures, _ = compare(layer, x, case.rank, names, options.effort(), options.device)
    return {"case": asdict(case), "trained": trained, "contenders": figures}
