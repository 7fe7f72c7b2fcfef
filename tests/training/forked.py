"""Runs of `isotune train` in processes that can be killed, all forked from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from multiprocessing.connection import Connection
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tiny import environment

from isotune.cli.app import main
from isotune.training import run
from isotune.training.progress import ProgressLine

FORKED = multiprocessing.get_context("forkserver")
PAUSE = 0.05
"""Seconds after each step, in which a signal arrives."""


class Announcing(ProgressLine):
    """Prints STEP and the number of each step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Announce the step, then give others time to kill the run."""
        super().on_step_end(args, state, control, **kwargs)
        print("STEP", state.global_step, flush=True)
        time.sleep(PAUSE)


def _command(arguments: list[str], output: Connection, errors: Connection) -> None:
    """The command line, in the new process."""
    os.dup2(output.fileno(), 1)
    os.dup2(errors.fileno(), 2)
    run.ProgressLine = Announcing  # type: ignore[misc]
    sys.argv = ["isotune", *arguments]
    main()


class Started:
    """A command in a process of its own."""

    def __init__(self, arguments: list[str]) -> None:
        (output, their_output), (errors, their_errors) = FORKED.Pipe(duplex=False), FORKED.Pipe(duplex=False)
        self.process = FORKED.Process(target=_command, args=(arguments, their_output, their_errors))
        self.process.start()
        self.output, self.errors = (os.fdopen(os.dup(pipe.fileno())) for pipe in (output, errors))
        for pipe in (output, their_output, errors, their_errors):
            pipe.close()

    def signal_at_step(self, step: int, number: int, delay: float = 0.0) -> None:
        """Send a signal once the process has announced `step`, after a delay."""
        for line in self.output:
            if line.strip() == f"STEP {step}":
                time.sleep(delay)
                assert self.process.pid is not None
                os.kill(self.process.pid, number)
                return
        raise AssertionError(f"the run ended before step {step}: {self.errors.read()}")

    def end(self, timeout: float = 120) -> tuple[int | None, str]:
        """Wait for the end; the exit code, and what was said on standard error."""
        self.process.join(timeout)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
        self.output.close()
        with self.errors:
            return code, self.errors.read()


def start_slowly(*arguments: str | Path) -> Started:
    """Start the command; each step prints STEP and its number."""
    FORKED.set_forkserver_preload([__name__, "transformers.models.bert.modeling_bert"])
    with patch.dict(os.environ, {**environment(), "PYTHONPATH": os.pathsep.join(sys.path)}):
        ensure_running()
    return Started([*map(str, arguments)])
