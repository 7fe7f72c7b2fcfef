"""What a run cost: seconds a step, tokens a second and peak memory."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import TrainerCallback

WARM_UP = 3
"""Steps left out of the median while caches fill, where there are more."""

T = TypeVar("T")


class StepTimer(TrainerCallback):
    """Measures each optimizer step from its first batch to the update, and counts its tokens without the padding."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.tokens: list[Tensor] = []
        self._start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.tokens.append(torch.tensor(0))
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock once the device is done."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._start)

    def count(self, attention_mask: Tensor) -> None:
        """Add a batch, of shape (batch, length), to the tokens of the step; the device is not waited for."""
        self.tokens[-1] = attention_mask.sum() + self.tokens[-1]

    def tokens_per_second(self) -> float | None:
        """Tokens a second without the warm-up; None where this process took no step, or its batches have none."""
        tokens, seconds = self._steady(self.tokens), self._steady(self.seconds)
        return sum(int(count) for count in tokens) / sum(seconds) if seconds and any(tokens) else None

    def median(self) -> float | None:
        """Median seconds a step without the warm-up; None where this process took no step."""
        seconds = self._steady(self.seconds)
        return statistics.median(seconds) if seconds else None

    def _steady(self, measured: list[T]) -> list[T]:
        """The steps that ended, without the warm-up where there are more."""
        ended = measured[: len(self.seconds)]
        return ended[WARM_UP:] or ended


def reset_peak_memory() -> None:
    """Start measuring the peak anew (where the system allows it), so that runs in one process stay apart."""
    gc.collect()  # an earlier run's model, which only cycles keep alive
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes() -> int:
    """Peak since the reset: of the device's allocator on CUDA, else the process's resident set."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
