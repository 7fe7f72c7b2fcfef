"""The export of an HRA adapter on a 7B-shaped base from its folder: time and peak memory in a process of its own.

The base is random weights of LLaMA2-7B's q and v in sharded safetensors, one shard a layer, in a temporary folder.
`python -m benchmarks.streaming BASE ADAPTER OUTPUT THREADS` is the process.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import isotune
from benchmarks.memory import run_child
from benchmarks.options import Options
from benchmarks.peak import peak_bytes, reset_peak
from benchmarks.timing import spread

TARGETS = ("q_proj", "v_proj")
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class StreamCase:
    """Layers of `d` x `d` query and value projections, and the adapter's rank."""

    layers: int
    d: int
    rank: int

    @property
    def title(self) -> str:
        """For the progress line."""
        return f"export of a 7B-shaped adapter, {self.layers} layers of {self.d} x {self.d} q and v, r={self.rank}"


def case(options: Options) -> StreamCase:
    """LLaMA2-7B's width; a small one when quick."""
    return StreamCase(2, 512, 32) if options.quick else StreamCase(options.layers, 4096, 32)


def measure(case: StreamCase, options: Options) -> dict[str, Any]:
    """Write the base and adapters for all of its layers and for one, then read and export in fresh processes."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_base(case, folder / "base", options.seed)
        write_adapter(case, folder / "adapter", options.seed)
        write_adapter(replace(case, layers=1), folder / "one", options.seed)
        runs, single = [], []
        for _ in range(1 if options.quick else 3):
            runs.append(_in_process(folder, "adapter", options.threads))
            single.append(_in_process(folder, "one", options.threads)["export_cold_peak"])
    figures = {key: spread([float(run[key]) for run in runs]) for key in runs[0]}
    return {
        "case": asdict(case) | {"weight_bytes": case.d**2 * DTYPE.itemsize, "dtype": str(DTYPE).split(".")[1]},
        "export": figures | {"export_peak_of_one_layer": spread(single)},
    }


def _in_process(folder: Path, adapter: str, threads: int) -> dict[str, float]:
    folders = [str(folder / name) for name in ("base", adapter, f"{adapter}-lora")]
    return run_child("benchmarks.streaming", [*folders, str(threads)])


def _paths(case: StreamCase) -> list[tuple[int, str]]:
    return [(i, f"model.layers.{i}.self_attn.{name}") for i in range(case.layers) for name in TARGETS]


def write_base(case: StreamCase, folder: Path, seed: int) -> None:
    """Random weights, one shard a layer, with the index that transformers writes."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    files = {}
    for i in range(case.layers):
        file = f"model-{i + 1:05d}-of-{case.layers:05d}.safetensors"
        keys = [f"{path}.weight" for layer, path in _paths(case) if layer == i]
        weights = {key: torch.randn(case.d, case.d, generator=generator).mul_(0.02).to(DTYPE) for key in keys}
        save_file(weights, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(keys, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": case.d}))


def write_adapter(case: StreamCase, folder: Path, seed: int) -> None:
    """A random HRA adapter, saved from a model whose weights are one number each, seen as large."""
    model = nn.Module()
    for _, path in _paths(case):
        parent = model
        *parents, name = path.split(".")
        for part in parents:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        layer = nn.Linear(case.d, case.d, bias=False, device="meta")
        layer.weight = nn.Parameter(torch.zeros(()).expand(case.d, case.d), requires_grad=False)
        parent.add_module(name, layer)
    isotune.adapt(model, isotune.HRA(rank=case.rank, start="random"), list(TARGETS), seed=seed)
    isotune.save(model, folder)


def read_all(base: Path) -> None:
    """Read every weight into memory, one at a time."""
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118  (safe_open has no iterator)
                opened.get_tensor(key).clone()


def timed(work: Any) -> dict[str, float]:
    """Seconds of `work` and the bytes by which it raised the peak of resident memory."""
    reset_peak()
    before = peak_bytes()
    start = time.perf_counter()
    work()
    return {"seconds": time.perf_counter() - start, "peak": peak_bytes() - before}


def forget(base: Path) -> None:
    """Ask the system to drop the files from its page cache; some file systems do not."""
    for file in base.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_and_export(base: Path, adapter: Path, output: Path) -> dict[str, float]:
    """Time reading and the export, fp32 factors as by default, with the page cache cold and then warm.

    The peaks to go by are the cold ones: the second time round, memory that was freed may still be resident.
    """
    figures, residual = {}, []

    def export() -> None:
        residual.append(isotune.export_lora(adapter, output, base=base).residual)

    for cache, prepare in (("cold_", forget), ("", read_all)):
        for name, work in (("read", lambda: read_all(base)), ("export", export)):
            prepare(base)
            figures |= {f"{name}_{cache}{key}": value for key, value in timed(work).items()}
    return figures | {"residual": max(residual)}


if __name__ == "__main__":
    *folders, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    print(json.dumps(read_and_export(*map(Path, folders))))
