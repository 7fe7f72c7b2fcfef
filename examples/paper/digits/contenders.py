"""The methods at about one budget, the runs that are asked for, and the file in which their results are kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from unet import ATTENTION

import isotune
from isotune import Settings

SIZES: dict[str, dict[str, Any]] = {
    "hra": {"rank": 4},
    "lora": {"rank": 2},
    "oft": {"block": 8},
    "boft": {"block": 4},
    "soda": {},
    "ortha": {"rank": 4},
}
"""All keep about 4 numbers for each input of a layer, but for SODA, whose singular values are no more than 1."""
FULL = "full"
ALONE = "outline layer alone"
"""No adapter: for a condition, the layer that reads it trains and nothing else."""
RATES = {"hra": 3e-3, "lora": 2e-3, "oft": 1e-3, "boft": 1e-3, "soda": 5e-4, "ortha": 2e-3, FULL: 3e-4, ALONE: 3e-3}
"""Those whose multiples are tried."""
SEARCH_SEED = 0
"""Of the runs that choose a rate; those that are reported have the seeds from 1 on."""
Row = dict[str, Any]
Made = dict[str, Tensor]
"""Pictures (n, 1, 8, 8) by what was asked for."""


@dataclass(frozen=True)
class Asked:
    """What the command line asks for."""

    methods: tuple[str, ...]
    rates: tuple[float, ...]
    seeds: int
    steps: int
    samples: int
    sampling_steps: int


def settings_for(method: str, slot: int = 0) -> Settings:
    """The method at its size; of two adapters to be added OrthA wants to know which one it is."""
    return isotune.method(method, **SIZES[method], **({"slot": slot} if method == "ortha" else {}))


def adapted(model: nn.Module, method: str, seed: int, name: str = "one", slot: int = 0) -> nn.Module:
    """The model with a fresh adapter on its attention, which alone runs and trains; or all of it but the words."""
    if method == FULL:
        model.requires_grad_(True).words.requires_grad_(False)
        return model
    return isotune.adapt(model, settings_for(method, slot), ATTENTION, name=name, seed=seed)


def trained_numbers(model: nn.Module) -> int:
    """How many numbers train."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def best_rates(
    methods: Iterable[str], rates: tuple[float, ...], make: Callable[[str, float], Row]
) -> dict[str, float]:
    """For each method the multiple of its usual rate with the highest score; of equal ones the first."""
    return {method: max(rates, key=lambda multiple: make(method, multiple)["score"]) for method in methods}


class Results:
    """Rows of results in a file, each under its key, so that what was stopped goes on where it was."""

    def __init__(self, folder: Path) -> None:
        self.file, self.folder = folder / "results.json", folder / "pictures"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rows: dict[str, Row] = json.loads(self.file.read_text()) if self.file.exists() else {}

    def get(self, key: str, make: Callable[[], tuple[Row, Made]]) -> Row:
        """The row under the key, made where it is not there; the pictures that it measured are kept beside."""
        if key not in self.rows:
            row, pictures = make()
            torch.save(pictures, self._pictures(key))
            self.rows[key] = {name: round(v, 5) if isinstance(v, float) else v for name, v in row.items()}
            self.file.write_text(json.dumps(self.rows, indent=0) + "\n")
            print(key, json.dumps(self.rows[key]), flush=True)
        return self.rows[key]

    def pictures(self, key: str) -> Made:
        """The pictures beside a row."""
        return torch.load(self._pictures(key), weights_only=True)

    def _pictures(self, key: str) -> Path:
        return self.folder / f"{key.replace('/', '_')}.pt"
