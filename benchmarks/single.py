"""One frozen layer, all contenders on it: time forward and forward + backward, and bytes saved for backward."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import isotune
from benchmarks.contenders import attach, too_costly
from benchmarks.saved import saved_bytes
from benchmarks.timing import Effort, Samples, Step, alternate, clock, spread

REFUSALS = (ValueError, TypeError, AssertionError, ImportError, RuntimeError, isotune.IsotuneError)
"""What a contender raises where it cannot adapt the layer (RuntimeError has NotImplementedError in it)."""


class Holder(nn.Module):
    """A model of one layer, since adapters are attached to a model's layers."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


def adapted_layer(name: str, layer: nn.Module, rank: int) -> nn.Module:
    """The layer with the adapter called `name`; the frozen tensors themselves are shared with `layer`."""
    shared = {id(p): p for p in layer.parameters()}
    holder = Holder(copy.deepcopy(layer, shared))
    attach(name, holder, rank, ["layer"])
    return holder.layer


def training_step(layer: nn.Module, x: Tensor, gradient: Tensor, device: str) -> Step:
    """Forward and, where anything is trained, backward from the given output gradient."""
    trained = [p for p in layer.parameters() if p.requires_grad]
    now = clock(device)

    def step() -> dict[str, float]:
        x.grad = None
        for p in trained:
            p.grad = None
        start = now()
        y = layer(x)
        forward = now()
        if y.requires_grad:
            y.backward(gradient)
        return {"forward": forward - start, "total": now() - start}

    return step


def columns(layer: nn.Module) -> int:
    """The number of columns of the layer's dense weight."""
    return layer.weight[0].numel()


def compare(
    layer: nn.Module, x: Tensor, rank: int, names: Iterable[str], effort: Effort, device: str = "cpu"
) -> tuple[dict[str, dict[str, Any]], dict[str, Samples]]:
    """Figures of every contender on `layer` with input `x`, and the samples they come from.

    A contender that is left out, or refuses the layer, has the reason under "skipped".
    """
    figures: dict[str, dict[str, Any]] = {}
    steps: dict[str, Step] = {}
    layer.requires_grad_(False)
    with torch.no_grad():
        gradient = torch.ones_like(layer(x))
    for name in names:
        reason = too_costly(name, columns(layer), rank, x.element_size(), device)
        if reason is None:
            try:
                adapted = adapted_layer(name, layer, rank)
                figures[name] = saved_bytes(adapted, lambda adapted=adapted: adapted(x))
                steps[name] = training_step(adapted, x, gradient, device)
                continue
            except REFUSALS as error:
                reason = f"refused: {str(error).splitlines()[0]}"
        figures[name] = {"skipped": reason}
    samples = alternate(steps, effort)
    for name, sample in samples.items():
        figures[name] |= {phase: spread(values) for phase, values in sample.phases.items()}
    gc.collect()
    return figures, samples
