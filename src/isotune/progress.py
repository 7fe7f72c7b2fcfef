"""A progress bar on standard error, for long work anywhere in the library."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def progress_bar(console: Console, enabled: bool = True) -> Progress:
    """A bar with counts and the time left, shown only where the console is a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not (enabled and console.is_terminal),
        transient=True,
    )


@contextmanager
def counting(description: str, total: int | None, enabled: bool = True) -> Iterator[Callable[[int], None]]:
    """A bar over `total` things (None where it is not known); yields the function that advances it."""
    with progress_bar(Console(stderr=True), enabled) as bar:
        task = bar.add_task(description, total=total)
        yield lambda count: bar.advance(task, count)
