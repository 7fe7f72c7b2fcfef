"""One merge in a process of its own, which holds nothing else: its seconds and its memory.

`python -m benchmarks.one_merge RULE OPTIONS OUTPUT THREADS ADAPTER...`, with the options as JSON, is such a process.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.peak import peak_bytes, reset_peak
from isotune.merging.adapters.merge import merge
from isotune.merging.registry import rule_class
from isotune.merging.reversible.adapters import compress_adapters


def one_merge(
    rule: str, output: Path, adapters: Sequence[Path], options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Merge by a rule, or compress by "rmm", and tell what it took; what is written is removed."""
    rule_class(rule)  # so that no import is counted
    reset_peak()
    before, cpu, wall = peak_bytes(), time.process_time(), time.perf_counter()
    if rule == "rmm":
        found = compress_adapters(adapters, output, progress=False, **(options or {}))
        error, rank = max(found.errors.values()), None
    else:
        merged = merge(adapters, rule, options=dict(options or {}), output=output, modules="drop", progress=False)
        error, rank = merged.error, max(merged.ranks.values())
    figures = {
        "models": len(adapters),
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "peak_bytes": peak_bytes(),
        "added_bytes": peak_bytes() - before,
        "read_bytes": sum(_size(adapter) for adapter in adapters),
        "written_bytes": _size(output),
        "rank": rank,
        "error": error,
    }
    shutil.rmtree(output)
    return figures


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


if __name__ == "__main__":
    _, asked, chosen, where, threads, *folders = sys.argv
    torch.set_num_threads(int(threads))
    print(json.dumps(one_merge(asked, Path(where), list(map(Path, folders)), json.loads(chosen))))
