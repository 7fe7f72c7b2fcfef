"""Two processes go where one goes: with replicated parameters, sharing the work, and with sharded ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_two_processes_are_one_to_rounding() -> None:
    script = Path(__file__).parent / "in_processes.py"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 10
    for name, figures in found.items():
        assert figures["moved"] > 1e-2, name
        assert figures["replicated"] < 1e-9 * figures["moved"], name
        assert figures["sharded"] < 1e-9 * figures["moved"], name
        assert figures["shards"], name
