"""What a person sees of a comparison: how far it is, what runs, how long it will take."""

from __future__ import annotations

import time
from datetime import timedelta
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from isotune.comparison.results import Line
from isotune.comparison.units import Unit
from isotune.training.progress import Screen


class SweepView:
    """A bar over all runs with the time left, and a line for each that runs; in a log, a line for each result."""

    def __init__(self, screen: Screen, total: int, done: int, metric: str) -> None:
        self.screen, self.total, self.done, self.metric = screen, total, done, metric
        self.already, self.since = done, time.monotonic()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=screen.console,
            disable=not (screen.enabled and screen.console.is_terminal),
            transient=True,
        )
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> SweepView:
        if self.done:
            self.screen.say(f"{self.done} of {self.total} runs were done before; going on")
        self.bar.start()
        self.whole = self.bar.add_task("all runs", total=self.total, completed=self.done, left="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def started(self, unit: Unit) -> None:
        """Show a unit that runs now."""
        self.tasks[unit.name] = self.bar.add_task(f"  {unit.name}", total=None, left="")

    def finished(self, unit: Unit, line: Line) -> None:
        """Say what came of a unit."""
        self.done += 1
        self.bar.remove_task(self.tasks.pop(unit.name))
        self.refresh()
        self.screen.say(
            f"{self.done}/{self.total} {unit.name}: {_said(line, self.metric)} in {line.seconds:.0f} s{self._left()}"
        )

    def refresh(self) -> None:
        """Show the time that is left."""
        self.bar.update(self.whole, completed=self.done, left=self._left().lstrip("; "))

    def _left(self) -> str:
        new = self.done - self.already
        if not new or self.done >= self.total:
            return ""
        each = (time.monotonic() - self.since) / new
        return f"; {timedelta(seconds=round(each * (self.total - self.done)))} left"


def _said(line: Line, metric: str) -> str:
    if not line.done:
        return f"failed ({line.error})"
    found = line.metrics
    names = (f"test_{metric}", f"validation_{metric}", "seconds_per_step")
    name = next((name for name in names if name in found), None)
    return f"{name.replace('_', ' ')} {found[name]:.4f}" if name else "done"
