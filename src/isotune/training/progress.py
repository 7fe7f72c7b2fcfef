"""What a person sees of a run: on standard error, from the first process only."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import Progress
from transformers import TrainerCallback
from transformers import logging as transformers_logging

from isotune.model.rates import crowding, running_adapters
from isotune.progress import progress_bar


def is_first_process() -> bool:
    """Whether this process writes and prints; under torchrun only one of them does."""
    return os.environ.get("RANK", "0") == "0"


def lone_process() -> str | None:
    """What to say where `accelerate launch` was asked for several processes and started this one alone.

    With `--cpu` it leaves them to MPI; what it sets for them is all that tells.
    """
    told = os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_ADDR" in os.environ
    started = any(
        name in os.environ for name in ("RANK", "WORLD_SIZE", "PMI_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE")
    )
    if not told or started:
        return None
    return (
        "accelerate launch --cpu starts one process, whatever --num_processes says, so that this run is one; several "
        "on CPUs: torchrun --nproc-per-node 2 -m isotune.cli train recipe.yaml"
    )


def quiet_libraries() -> None:
    """Turn off the loggers' and progress bars' noise of the libraries underneath."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


class Screen:
    """Messages and progress bars for people; silent when `enabled` is false or on other processes."""

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled and is_first_process()
        self.console = Console(stderr=True, quiet=not self.enabled, highlight=False, soft_wrap=True)

    def say(self, message: str) -> None:
        """One line of plain text."""
        self.console.print(message, markup=False)

    def bar(self) -> Progress:
        """A progress bar, shown only on a terminal."""
        return progress_bar(self.console, self.enabled)

    @contextmanager
    def counting(self, description: str, total: int) -> Iterator[Callable[[int], None]]:
        """A bar over `total` things; yields the function that advances it."""
        with self.bar() as bar:
            task = bar.add_task(description, total=total)
            yield lambda count: bar.advance(task, count)


class ProgressLine(TrainerCallback):
    """Steps, loss and remaining time: a bar on a terminal, otherwise a line at each logging step."""

    def __init__(self, screen: Screen, metric: str = "accuracy") -> None:
        self.screen, self.metric = screen, metric
        self.bar = screen.bar()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        """Show the bar, and how much smaller steps are for depth."""
        count = len(running_adapters(model))
        if (factor := crowding(count)) > 1:
            self.screen.say(f"{count} adapted layers change at once: their steps are divided by {factor:.2f}")
        self.bar.start()
        self.task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance it."""
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the loss, or the validation metrics."""
        if logs and "loss" in logs:
            self.bar.update(self.task, description=f"loss {logs['loss']:.4f}")
            if self.bar.disable:
                left = self.bar.tasks[self.task].time_remaining
                remaining = f", {timedelta(seconds=round(left))} left" if left else ""
                self.screen.say(f"step {state.global_step}/{state.max_steps}: loss {logs['loss']:.4f}{remaining}")
        elif logs and "eval_loss" in logs:
            names = dict.fromkeys((self.metric, "accuracy", "macro_f1", "perplexity", "loss"))
            shown = [f"{name} {logs[f'eval_{name}']:.4f}" for name in names if f"eval_{name}" in logs]
            self.screen.say(f"step {state.global_step}: validation {', '.join(shown)}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the bar away."""
        self.bar.stop()
