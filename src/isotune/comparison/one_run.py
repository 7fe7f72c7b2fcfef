"""One run of a comparison, in whatever process: train, evaluate, and see what was forgotten."""

from __future__ import annotations

import functools
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from isotune.checkpoint.export import export_lora
from isotune.checkpoint.files import TENSORS
from isotune.comparison.recipe import ComparisonRecipe, comparison_from
from isotune.comparison.results import FROZEN, FULL, Line
from isotune.comparison.units import Unit
from isotune.errors import DivergedError, IsotuneError, NoLowRankFormError
from isotune.folders import MODEL
from isotune.training.folder import RunFolder
from isotune.training.forgetting import Forgetting
from isotune.training.pretrained import frozen_metrics, frozen_probe
from isotune.training.probe import Probe
from isotune.training.progress import quiet_libraries
from isotune.training.recipe import Recipe
from isotune.training.run import Result, train
from isotune.training.session import TaskSpec
from isotune.training.start import starts_from_probe
from isotune.training.tasks.names import TASKS
from isotune.training.trainer import Along


@functools.lru_cache(maxsize=1)
def bench(recipe_yaml: str, folder: str) -> Bench:
    """The bench of this process: what it has read and measured once serves all its units."""
    return Bench(comparison_from(recipe_yaml), Path(folder))


def run_unit(recipe_yaml: str, folder: str, unit: Unit, threads: int | None = None) -> Line:
    """Run a unit in the comparison's folder, or go on with it, and give its line; called in the workers."""
    quiet_libraries()
    if threads is not None and torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    return bench(recipe_yaml, folder).run(unit)


class Bench:
    """Runs units of one comparison."""

    def __init__(self, recipe: ComparisonRecipe, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        self._probes: dict[tuple[int, bool], tuple[Probe, dict[str, float]]] = {}
        self._forgetting: Forgetting | None = None

    def run(self, unit: Unit) -> Line:
        """The unit's line: its metrics, or why it failed. Raises KeyboardInterrupt after Ctrl-C."""
        start = time.perf_counter()
        output = self.folder / "runs" / unit.name
        try:
            found = self._frozen(unit, output) if unit.cell.method["name"] == FROZEN else self._trained(unit, output)
        except DivergedError as error:
            found = {"status": "failed", "error": str(error)}
            shutil.rmtree(output, ignore_errors=True)
        except IsotuneError as error:
            raise IsotuneError(f"{unit.name}: {error}") from None
        return unit.line(**found, seconds=round(time.perf_counter() - start, 3))

    def _trained(self, unit: Unit, output: Path) -> dict[str, Any]:
        steps = self.recipe.compare.cost_steps if unit.kind == "cost" else None
        recipe = self.recipe.run(unit.cell.method, unit.rate, unit.seed, output, unit.kind == "seed", steps)
        probe = self._probe(recipe)[0] if starts_from_probe(recipe) else None
        folder = RunFolder(output)
        along = self._along() if unit.kind == "seed" else None
        go = functools.partial(train, recipe, progress=False, probe=probe, baselines=False, along=along)
        result = go(resume=folder.is_run())
        if unit.kind == "seed" and result.model is None:  # killed after the run, before its line
            result = go(overwrite=True)
        metrics = _numbers(result.metrics)
        if unit.kind == "seed":
            metrics |= self._forgotten(result.model)
            metrics |= _stored(unit, result)
        kept = unit.kind == "seed"
        curve = folder.history() if kept else []
        _tidy(folder, kept)
        return {
            "status": "done",
            "metrics": metrics,
            "curve": curve,
            "run": str(output.relative_to(self.folder)) if kept else None,
        }

    def _frozen(self, unit: Unit, output: Path) -> dict[str, Any]:
        """The base model as it is, with a linear probe where the task is to classify."""
        recipe = self.recipe.run({"name": "lora"}, None, unit.seed, output, test=True)
        metrics = dict(self._probe(recipe)[1] if TASKS[recipe.task].probed else frozen_metrics(recipe))
        metrics |= _named(held_out.base) if (held_out := self._held_out()) else {}
        metrics |= {"adapter_bytes": 0, "export_rank": 0}
        return {"status": "done", "metrics": metrics}

    def _probe(self, recipe: Recipe) -> tuple[Probe, dict[str, float]]:
        """A linear probe on a run's rows, and its metrics; the same for all methods."""
        key = (recipe.seed, recipe.data.test is not None)
        if key not in self._probes:
            fitted = frozen_probe(recipe)
            self._probes[key] = fitted.probe, fitted.metrics  # without the model
        return self._probes[key]

    def _held_out(self) -> Forgetting | None:
        settings = self.recipe.compare.forgetting
        if settings is not None and self._forgetting is None:
            self._forgetting = Forgetting(settings, TaskSpec.of(self.recipe, []))
        return self._forgetting

    def _along(self) -> Along | None:
        """What is measured beside each validation."""
        settings = self.recipe.compare.forgetting
        return self._forgotten if settings is not None and settings.points else None

    def _forgotten(self, model: Any) -> dict[str, float]:
        return _named(held_out.measure(model)) if (held_out := self._held_out()) else {}


def _named(measures: Mapping[str, float]) -> dict[str, float]:
    return {f"forgetting_{name}": value for name, value in measures.items()}


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def _stored(unit: Unit, result: Result) -> dict[str, Any]:
    """Bytes on disk, and the rank of the LoRA that it exports to (none where it has no such form)."""
    files = list((result.output / MODEL).glob("*.safetensors")) or [result.adapter / TENSORS]
    found: dict[str, Any] = {"adapter_bytes": sum(file.stat().st_size for file in files)}
    if unit.cell.method["name"] != FULL:
        with tempfile.TemporaryDirectory() as folder:
            try:
                found["export_rank"] = export_lora(result.model, Path(folder) / "lora").rank
            except NoLowRankFormError:
                found["export_rank"] = None
    return found


def _tidy(folder: RunFolder, keep: bool) -> None:
    """Leave of a finished run what is looked at later; of a trial, nothing but its line is."""
    for checkpoint in folder.path.glob("checkpoint-*") if keep else [folder.path]:
        shutil.rmtree(checkpoint, ignore_errors=True)
