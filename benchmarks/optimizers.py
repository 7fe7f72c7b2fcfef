"""One step of an optimizer on the factors of a LoRA on all linear layers of a model: ours, and others' Muon and kin.

Gradients stay the same; what is timed is the step alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pytorch_optimizer
import torch
from torch import nn

from benchmarks.options import Options
from benchmarks.timing import Step, alternate, clock, spread
from isotune import optim

TORCH = "torch-muon"


@dataclass(frozen=True)
class OptimizerCase:
    """Factors of rank `rank` on the seven linear layers of each block of a Llama."""

    model: str
    blocks: int
    width: int
    key_width: int
    inner: int
    rank: int
    dtype: str = "float32"

    @property
    def title(self) -> str:
        """For the progress line."""
        return f"optimizers: {self.model}, r={self.rank}"

    def shapes(self) -> list[tuple[int, int]]:
        """A and B of every layer."""
        d, kv, inner, r = self.width, self.key_width, self.inner, self.rank
        layers = [(d, d), (d, kv), (d, kv), (d, d), (d, inner), (d, inner), (inner, d)]
        return [shape for n, m in layers for shape in ((r, n), (m, r))] * self.blocks


def cases(options: Options) -> Iterator[OptimizerCase]:
    """The shapes of Llama-3.2-1B."""
    if options.quick:
        yield OptimizerCase("Llama-1B, 2 of 16 blocks", 2, 2048, 512, 8192, 16)
        return
    for rank in (16, 64):
        yield OptimizerCase("Llama-1B", 16, 2048, 512, 8192, rank)


def contenders() -> dict[str, Any]:
    """What makes the optimizers of parameters, by name. Others' Muon iterates in bf16, as isotune-muon-bf16 does."""
    common: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1}

    def theirs(params: Any) -> Any:
        return [{"params": params, "use_muon": True, **common}]

    return {
        TORCH: lambda params: torch.optim.Muon(params, **common),
        "pytorch-optimizer-muon": lambda params: pytorch_optimizer.Muon(theirs(params)),
        "pytorch-optimizer-normuon": lambda params: pytorch_optimizer.NorMuon(theirs(params)),
        "isotune-muon": lambda params: optim.Muon(params, **common),
        "isotune-muon-bf16": lambda params: optim.Muon(params, ns_dtype=torch.bfloat16, **common),
        "isotune-normuon": lambda params: optim.NorMuon(params, **common),
        "isotune-trion": lambda params: optim.Trion(params, rank=8, **common),
        "isotune-conda": lambda params: optim.Conda(params, **common),
        "torch-adamw": lambda params: torch.optim.AdamW(params, **common),
    }


def measure(case: OptimizerCase, options: Options) -> dict[str, Any]:
    """Time a step of each; the first, which makes the state, is not timed."""
    generator = options.generator()
    dtype = getattr(torch, case.dtype)
    drawn = [torch.randn(shape, generator=generator).to(options.device, dtype) for shape in case.shapes()]
    steps: dict[str, Step] = {}
    for name, make in contenders().items():
        params = [nn.Parameter(t.clone()) for t in drawn]
        for p, gradient in zip(params, drawn, strict=True):
            p.grad = gradient.flip(0, 1)
        steps[name] = _timed(make(params), options.device)
    samples = alternate(steps, options.effort())
    figures = {name: {"total": spread(found.phases["total"])} for name, found in samples.items()}
    return {"case": asdict(case), "numbers": sum(t.numel() for t in drawn), "contenders": figures}


def _timed(optimizer: torch.optim.Optimizer, device: str) -> Step:
    now = clock(device)
    optimizer.step()

    def step() -> dict[str, float]:
        start = now()
        optimizer.step()
        return {"total": now() - start}

    return step
