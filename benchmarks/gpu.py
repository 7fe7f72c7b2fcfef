"""`python -m benchmarks.gpu`: everything that takes a GPU, in one go and within a time: the tests, then the figures.

The kernels' tests run first, then the sections in the order of what their figures say; each in a process of its own,
which is stopped when the time is up. What was measured is in the results folder, whatever came after it, and
`gpu.json` there says how each part ended. `--device cpu --quick` tries the whole of it in small on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.__main__ import RESULTS

ROOT = Path(__file__).parents[1]
TESTS = ("tests/kernels", "tests/adapters/test_once.py", "tests/adapters/test_inference.py")
SECTIONS = ("launches", "layer", "decoding", "model", "loss", "memory", "methods")


def main(arguments: list[str] | None = None) -> int:
    """Parse the options, run the parts, and say how they ended; 1 where one failed or was stopped."""
    parser = argparse.ArgumentParser("benchmarks.gpu", description="Test and time isotune on a GPU.")
    parser.add_argument("--device", default="cuda", help="cuda (default), or cpu to try this")
    parser.add_argument("--quick", action="store_true", help="small cases, few repetitions")
    parser.add_argument("--seconds", type=float, default=480, help="in all (default: 480)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    given = parser.parse_args(arguments)
    end = time.monotonic() + given.seconds
    parts: dict[str, list[str]] = {"tests": ["-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]}
    for section in SECTIONS:
        quick = ["--quick"] if given.quick else []
        options = ["--device", given.device, "--output", str(given.output), *quick]
        parts[section] = ["-m", "benchmarks", "--only", section, *options]
    found: dict[str, dict[str, Any]] = {}
    given.output.mkdir(parents=True, exist_ok=True)
    for name, command in parts.items():
        found[name] = run(command, end - time.monotonic())
        print(f"{name}: {found[name]['ended']}, {found[name]['seconds']} s", flush=True)
        (given.output / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
    return int(any(part["ended"] != "done" for part in found.values()))


def run(command: list[str], seconds: float) -> dict[str, Any]:
    """Run a module in a fresh Python for at most so many seconds: how it ended, how long it took, its last words."""
    start = time.monotonic()
    if seconds < 1:
        return {"ended": "no time was left", "seconds": 0}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    try:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds
        )
        ended, said = "done" if done.returncode == 0 else "failed", done.stdout + done.stderr
    except subprocess.TimeoutExpired as stopped:
        ended, said = "stopped", (stopped.stdout or b"").decode(errors="replace")
    words = {} if ended == "done" else {"said": said[-3000:]}
    return {"ended": ended, "seconds": round(time.monotonic() - start, 1), **words}


if __name__ == "__main__":
    sys.exit(main())
