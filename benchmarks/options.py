"""What a run was asked for; every section reads its sizes and its effort from here."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.timing import Effort


@dataclass(frozen=True)
class Options:
    """Settings of one run; they are written beside its figures."""

    device: str = "cpu"
    quick: bool = False
    """Few and small cases, few repetitions: about a minute, and only to see that it works."""
    threads: int = 2
    layers: int = 4
    """Layers of the 7B-shaped export (LLaMA2-7B has 32)."""
    seed: int = 0

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.startswith("cuda")

    def effort(self, times: float = 1.0) -> Effort:
        """Repetitions of one contender: by time, between a least and a most number."""
        if self.quick:
            return Effort(seconds=0.05 * times, least=2, most=10)
        return Effort(seconds=1.0 * times, least=5, most=int(30 * times))

    def generator(self) -> torch.Generator:
        """A fresh CPU generator of the run's seed."""
        return torch.Generator().manual_seed(self.seed)
