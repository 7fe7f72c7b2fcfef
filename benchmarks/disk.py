"""Adapters on disk: save and load, ours and PEFT's, and our export to LoRA; MiniLM, attention, r = 8."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peft
from torch import nn

import isotune
from benchmarks import streaming
from benchmarks.contenders import attach
from benchmarks.model import target_paths
from benchmarks.models import ModelCase, build
from benchmarks.options import Options
from benchmarks.timing import Step, alternate, clock, spread

NAMES = ("peft-lora", "isotune-lora", "peft-hra", "isotune-hra")


def cases(options: Options) -> Iterator[ModelCase | streaming.StreamCase]:
    """MiniLM's adapters, and the export of a 7B-shaped one."""
    yield ModelCase("minilm", 0, 0, "attention")
    yield streaming.case(options)


def measure(case: ModelCase | streaming.StreamCase, options: Options) -> dict[str, Any]:
    """Compare saving and loading, or time the large export."""
    if isinstance(case, streaming.StreamCase):
        return streaming.measure(case, options)
    base = build(case, seed=options.seed)
    paths = target_paths(case, base)
    figures: dict[str, dict[str, Any]] = {name: {} for name in NAMES}
    with tempfile.TemporaryDirectory() as folder:
        for action, make in (("save", _save), ("load", _load), ("export", _export)):
            steps = {}
            for name in NAMES:
                if action != "export" or name.startswith("isotune"):
                    steps[name] = make(name, base, paths, Path(folder) / name, case.rank)
            for name, sample in alternate(steps, options.effort(1.0)).items():
                figures[name][action] = spread(sample.phases["total"])
    return {"case": asdict(case) | {"layers": len(paths)}, "contenders": figures}


def _timed(work: Callable[[], Any], prepare: Callable[[], Any] = lambda: None) -> Step:
    now = clock("cpu")

    def step() -> dict[str, float]:
        prepare()
        start = now()
        work()
        return {"total": now() - start}

    return step


def _save(name: str, base: nn.Module, paths: list[str], folder: Path, rank: int) -> Step:
    model: Any = attach(name, copy.deepcopy(base), rank, paths)
    return _timed(lambda: isotune.save(model, folder) if name.startswith("isotune") else model.save_pretrained(folder))


def _load(name: str, base: nn.Module, paths: list[str], folder: Path, rank: int) -> Step:
    models: list[nn.Module] = []

    def fresh() -> None:
        models[:] = [copy.deepcopy(base)]

    def load() -> None:
        if name.startswith("isotune"):
            isotune.load(models[0], folder)
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft.PeftModel.from_pretrained(models[0], folder)

    return _timed(load, fresh)


def _export(name: str, base: nn.Module, paths: list[str], folder: Path, rank: int) -> Step:
    model = attach(name, copy.deepcopy(base), rank, paths)
    return _timed(lambda: isotune.export_lora(model, folder.with_name(f"{name}-lora")))
