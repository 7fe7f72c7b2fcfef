"""A decoding step of a language model: one new token for each row, with the keys and values of those before it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

import isotune
from benchmarks.contenders import LOW_PRECISION_ONLY, REFERENCE, attach
from benchmarks.model import target_paths
from benchmarks.models import ModelCase, batch, build
from benchmarks.options import Options
from benchmarks.timing import Step, alternate, clock, spread

BARE = "frozen"
ROWS = "isotune-lora-by-row"
"""Four adapters, of which every row has its own."""


@dataclass(frozen=True)
class DecodingCase(ModelCase):
    """A model, its rows, and the tokens that came before."""

    @property
    def title(self) -> str:
        """For the progress line."""
        return f"decoding: {super().title}"


def cases(options: Options) -> Iterator[DecodingCase]:
    """One row and several."""
    if options.quick:
        yield DecodingCase("llama-tiny", 2, 8, "all-linear", 4)
        return
    model = "llama-1b" if options.cuda else "stories260k"
    for rows in (1, 8):
        yield DecodingCase(model, rows, 64, "all-linear", 16)


def contenders(low_precision: bool) -> list[str]:
    """Who takes part."""
    names = [BARE, REFERENCE, "isotune-lora", "isotune-hra", ROWS]
    return [*names, LOW_PRECISION_ONLY] if low_precision else names


def measure(case: DecodingCase, options: Options) -> dict[str, Any]:
    """Compare the contenders on one model, whose weights they share."""
    base = build(case, options.device, options.seed).eval()
    paths = target_paths(case, base)
    inputs = batch(case, base, options.device, options.generator())
    steps: dict[str, Step] = {}
    for name in contenders(options.cuda):
        model = copy.deepcopy(base, {id(p): p for p in base.parameters()})
        model = _by_row(model, case, paths) if name == ROWS else attach(name, model, case.rank, paths)
        steps[name] = decoding_step(model.eval(), inputs["input_ids"], options.device)
    samples = alternate(steps, options.effort(2.0))
    figures = {name: {"total": spread(found.phases["total"])} for name, found in samples.items()}
    return {"case": asdict(case) | {"layers": len(paths)}, "contenders": figures}


def decoding_step(model: nn.Module, ids: Tensor, device: str) -> Step:
    """One more token after `ids` (rows, tokens), again and again at the same place."""
    now = clock(device)
    run: Callable[..., Any] = model
    with torch.no_grad():
        cache = run(input_ids=ids, past_key_values=DynamicCache(config=model.config), use_cache=True).past_key_values

    def step() -> dict[str, float]:
        with torch.no_grad():
            start = now()
            run(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
            end = now()
        cache.crop(-1)
        return {"total": end - start}

    return step


def _by_row(model: nn.Module, case: DecodingCase, paths: list[str]) -> nn.Module:
    names = [f"user{i}" for i in range(min(4, max(2, case.batch)))]
    for seed, name in enumerate(names):
        isotune.adapt(model, isotune.LoRA(rank=case.rank), list(paths), name=name, seed=seed)
    return isotune.use(model, rows=[names[i % len(names)] for i in range(case.batch)], train=False)
