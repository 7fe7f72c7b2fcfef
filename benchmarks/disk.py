"""Adapters on disk: save and load, ours and PEFT's, and our export to LoRA; MiniLM, attention, r = 8."""

from __future__ import annotations

import copy
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
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
from benchmarks.timing import Step, alternate, spread

NAMES = ("peft-lora", "isotune-lora", "peft-hra", "isotune-hra")


def cases(options: Options) -> Iterator[ModelCase | streaming.StreamCase]:
    """MiniLM's adapters, and the export of a 7B-shaped one."""
    yield ModelCase("minilm", 0, 0, "attention")
    yield streaming.case(options)


@dataclass(frozen=True)
class Subject:
    """One contender's adapter, the model that it goes on, and its folder."""

    name: str
    base: nn.Module
    paths: list[str]
    folder: Path
    rank: int

    @property
    def ours(self) -> bool:
        """Whether isotune writes and reads it."""
        return self.name.startswith("isotune")

    def model(self) -> Any:
        """A fresh model with the adapter."""
        return attach(self.name, copy.deepcopy(self.base), self.rank, self.paths)


def measure(case: ModelCase | streaming.StreamCase, options: Options) -> dict[str, Any]:
    """Compare saving and loading, or time the large export."""
    if isinstance(case, streaming.StreamCase):
        return streaming.measure(case, options)
    base = build(case, seed=options.seed)
    paths = target_paths(case, base)
    figures: dict[str, dict[str, Any]] = {name: {} for name in NAMES}
    with tempfile.TemporaryDirectory() as folder:
        subjects = [Subject(name, base, paths, Path(folder) / name, case.rank) for name in NAMES]
        for action, make in (("save", _save), ("load", _load), ("export", _export)):
            steps = {s.name: make(s) for s in subjects if s.ours or action != "export"}
            for name, sample in alternate(steps, options.effort()).items():
                figures[name][action] = spread(sample.phases["total"])
    return {"case": asdict(case) | {"layers": len(paths)}, "contenders": figures}


def _timed(work: Callable[[], Any], prepare: Callable[[], Any] = lambda: None) -> Step:
    def step() -> dict[str, float]:
        prepare()
        start = time.perf_counter()
        work()
        return {"total": time.perf_counter() - start}

    return step


def _save(subject: Subject) -> Step:
    model = subject.model()
    return _timed(
        lambda: isotune.save(model, subject.folder) if subject.ours else model.save_pretrained(subject.folder)
    )


def _load(subject: Subject) -> Step:
    models: list[nn.Module] = []

    def fresh() -> None:
        models[:] = [copy.deepcopy(subject.base)]

    def load() -> None:
        if subject.ours:
            isotune.load(models[0], subject.folder)
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            peft.PeftModel.from_pretrained(models[0], subject.folder)

    return _timed(load, fresh)


def _export(subject: Subject) -> Step:
    model = subject.model()
    return _timed(lambda: isotune.export_lora(model, subject.folder.with_name(f"{subject.name}-lora")))
