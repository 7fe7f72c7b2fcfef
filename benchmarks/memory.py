"""Peak resident memory of training steps, each contender in processes of its own.

`python -m benchmarks.memory CONTENDER CASE DEVICE THREADS SEED` is such a process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import models
from benchmarks.contenders import attach, contenders
from benchmarks.model import optimizer_step, target_paths
from benchmarks.models import ModelCase, batch, build
from benchmarks.options import Options
from benchmarks.peak import peak_bytes, reset_peak
from benchmarks.timing import spread

STEPS = 3
ROOT = Path(__file__).parents[1]


def cases(options: Options) -> Iterator[ModelCase]:
    """The first model; on a GPU the large one, too."""
    chosen = list(models.cases(options))
    yield chosen[0]
    if options.cuda:
        yield from (case for case in chosen if case.model == "llama-1b")


def measure(case: ModelCase, options: Options) -> dict[str, Any]:
    """Run every contender's process, taking turns."""
    names = contenders(options.cuda and case.model.startswith("llama"))
    if options.quick:
        names = [name for name in names if name in ("peft-lora", "isotune-lora", "isotune-hra")]
    runs: dict[str, list[dict[str, int]]] = {name: [] for name in names}
    for _ in range(1 if options.quick else 3):
        for name in names:
            runs[name].append(_in_process(name, case, options))
    figures = {
        name: {key: spread([float(run[key]) for run in found]) for key in found[0]} for name, found in runs.items()
    }
    return {"case": asdict(case) | {"steps": STEPS}, "contenders": figures}


def _in_process(name: str, case: ModelCase, options: Options) -> dict[str, int]:
    arguments = [name, json.dumps(asdict(case)), options.device, str(options.threads), str(options.seed)]
    return run_child("benchmarks.memory", arguments)


def run_child(module: str, arguments: list[str]) -> dict[str, Any]:
    """Run a module of ours in a fresh Python and return the JSON object that it prints last."""
    command = [sys.executable, "-m", module, *arguments]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[2:])} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_of_steps(name: str, case: ModelCase, device: str, seed: int) -> dict[str, int]:
    """Bytes at the peak of a few training steps, and before them."""
    model = build(case, device, seed)
    paths = target_paths(case, model)
    inputs = batch(case, model, device, torch.Generator().manual_seed(seed))
    step = optimizer_step(case, attach(name, model, case.rank, paths), inputs, device)
    reset_peak(device)
    before = peak_bytes(device)
    for _ in range(STEPS):
        step()
    return {"before": before, "peak": peak_bytes(device)}


if __name__ == "__main__":
    contender, described, where, threads, seed = sys.argv[1:]
    torch.set_num_threads(int(threads))
    print(json.dumps(peak_of_steps(contender, ModelCase(**json.loads(described)), where, int(seed))))
