"""Whole training steps (forward, backward, AdamW) of real models, with equal target layers for everyone."""

from __future__ import annotations

import copy
import gc
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

import isotune
from benchmarks import models
from benchmarks.contenders import attach, contenders
from benchmarks.models import ModelCase, batch, build, loss_of
from benchmarks.options import Options
from benchmarks.timing import Step, alternate, clock, spread

cases = models.cases


def target_paths(case: ModelCase, model: nn.Module) -> list[str]:
    """The full paths of the layers that the case's targets name."""
    probe = isotune.adapt(copy.deepcopy(model), isotune.LoRA(rank=1), case.targets)
    return [row.site for row in isotune.describe(probe)]


def taking_part(case: ModelCase, low_precision: bool) -> list[str]:
    """Without PEFT's slow ones on a large model, and without its other methods where it is asked how to run."""
    names = contenders(low_precision)
    few = case.model.startswith("llama-") or case.how
    return [name for name in names if not few or name not in ("peft-hra", "peft-oft", "peft-boft")]


def optimizer_step(case: ModelCase, model: nn.Module, inputs: dict[str, Tensor], device: str) -> Step:
    """One training step; a model with nothing to train only runs forward, without a graph."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if case.how == "compiled":
        model.compile()
    optimizer = torch.optim.AdamW(trained, lr=1e-5) if trained else None
    loss, now = loss_of(case), clock(device)

    def forward_only() -> dict[str, float]:
        start = now()
        with torch.no_grad():
            loss(model, inputs)
        return {"total": now() - start}

    def step() -> dict[str, float]:
        start = now()
        value = loss(model, inputs)
        forward = now()
        value.backward()
        backward = now()
        optimizer.step()
        optimizer.zero_grad()
        end = now()
        return {"forward": forward - start, "backward": backward - forward, "total": end - start}

    return step if optimizer else forward_only


def measure(case: ModelCase, options: Options) -> dict[str, Any]:
    """Compare the contenders on one model. Every contender has a model of its own."""
    low_precision = options.cuda and case.model.startswith("llama")
    base = build(case, options.device, options.seed)
    paths = target_paths(case, base)
    inputs = batch(case, base, options.device, options.generator())
    figures: dict[str, dict[str, Any]] = {}
    steps: dict[str, Step] = {}
    for name in taking_part(case, low_precision):
        # The frozen weights are shared: the eight models take one model's memory.
        shared = {id(p): p for p in base.parameters()}
        try:
            model = attach(name, copy.deepcopy(base, shared), case.rank, paths)
            steps[name] = optimizer_step(case, model, inputs, options.device)
            steps[name]()
        except (ValueError, NotImplementedError, RuntimeError) as error:
            steps.pop(name, None)
            figures[name] = {"skipped": f"refused: {str(error).splitlines()[0]}"}
            continue
        figures[name] = {"trained": sum(p.numel() for p in model.parameters() if p.requires_grad)}
    for name, sample in alternate(steps, options.effort(6.0)).items():
        figures[name] |= {phase: spread(values) for phase, values in sample.phases.items()}
    gc.collect()
    return {"case": asdict(case) | {"layers": len(paths)}, "contenders": figures}
