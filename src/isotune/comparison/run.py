"""Run a comparison: hand out what is ready, keep what comes back, go on after any stop."""

from __future__ import annotations

import json
import os
import platform
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from isotune.checkpoint.files import write_atomically
from isotune.comparison.plan import Cell, make_plan
from isotune.comparison.progress import SweepView
from isotune.comparison.recipe import ComparisonRecipe
from isotune.comparison.results import Line, Summary
from isotune.comparison.store import Store
from isotune.comparison.summary import belonging, summarise
from isotune.comparison.units import Unit, planned, ready
from isotune.comparison.workers import InProcess, Processes, RayWorkers, Workers
from isotune.errors import IsotuneError
from isotune.training.progress import Screen, quiet_libraries
from isotune.training.tasks.names import metric_of


def compare(
    recipe: ComparisonRecipe,
    workers: int | None = None,
    ray: str | None = None,
    retry: bool = False,
    progress: bool = True,
    plan: list[Cell] | None = None,
) -> Summary:
    """Run what the comparison still needs, and give its summary, which is also in its folder.

    Args:
        recipe: From `build_comparison`. Its output folder may hold an earlier start: finished runs are kept.
        workers: Runs at once; by default one, or with Ray one for each of the cluster's cores.
        ray: Run on the Ray cluster at this address; "local" starts one here.
        retry: Run what failed once more.
        progress: Whether to show anything on standard error.
        plan: From `make_plan`, where it is at hand.

    Raises:
        IsotuneError: A mistake in the recipe, or a run that cannot go on; finished runs are kept.
        KeyboardInterrupt: After Ctrl-C; finished runs are kept.
    """
    quiet_libraries()
    recipe = recipe.resolved()
    store = Store(recipe.output)
    store.check(recipe)
    cells = plan or make_plan(recipe)
    with store.open(recipe):
        pool = _workers(recipe, workers, ray)
        try:
            _Sweep(recipe, cells, store, pool, retry, Screen(progress)).run()
        except BrokenProcessPool:
            raise IsotuneError(
                "a worker ended without a word (out of memory?); the same command goes on where it was"
            ) from None
        finally:
            pool.close()
            summary = write_summary(store, cells, recipe)
    return summary


def _workers(recipe: ComparisonRecipe, count: int | None, ray: str | None) -> Workers:
    given = (recipe.to_yaml(), recipe.output)
    if ray:
        return RayWorkers(*given, count, ray)
    return Processes(*given, count) if count and count > 1 else InProcess(*given)


def write_summary(store: Store, cells: list[Cell], recipe: ComparisonRecipe) -> Summary:
    """Summarise the results so far, and write that beside them."""
    summary = summarise(cells, recipe, store.lines(), environment())
    write_atomically(store.summary_file, json.dumps(summary.model_dump(), indent=1) + "\n")
    return summary


def environment() -> dict[str, Any]:
    """What the runs ran on and with."""
    packages = ("isotune", "torch", "transformers")
    return {
        **{f"{name}_version": version(name) for name in packages},
        "python_version": platform.python_version(),
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


class _Sweep:
    """The runs of one start."""

    def __init__(
        self,
        recipe: ComparisonRecipe,
        cells: list[Cell],
        store: Store,
        workers: Workers,
        retry: bool,
        screen: Screen,
    ) -> None:
        self.recipe, self.cells, self.store, self.workers = recipe, cells, store, workers
        self.lines = {n: line for n, line in store.lines().items() if line.done or not retry}
        self.running: dict[Future[Line], Unit] = {}
        done = len(belonging(cells, recipe, self.lines))
        self.view = SweepView(screen, planned(cells, recipe), done, metric_of(recipe.task, recipe.metric))

    def run(self) -> None:
        """Until nothing is left."""
        with self.view:
            while self._hand_out() or self.running:
                finished, _ = wait(self.running, timeout=1, return_when=FIRST_COMPLETED)
                self.view.refresh()
                for future in finished:
                    line = future.result()
                    unit = self.running.pop(future)
                    self.lines[unit.name] = line
                    self.store.add(line)
                    self.view.finished(unit, line)

    def _hand_out(self) -> bool:
        """Start what is ready, as far as there are free workers; whether there was anything to start."""
        started = False
        busy = {unit.name for unit in self.running.values()}
        for unit in ready(self.cells, self.recipe, self.lines):
            alone = unit.kind == "cost"
            if len(self.running) >= (1 if alone else self.workers.count):
                break
            if unit.name in busy:
                continue
            self.view.started(unit)
            self.running[self.workers.submit(unit, alone)] = unit
            started = True
        return started
