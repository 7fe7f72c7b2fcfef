"""Predictions a line at a time: a file that appears whole, when all its lines are written, or standard output."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from isotune.checkpoint.files import TEMPORARY, sync
from isotune.errors import IsotuneError
from isotune.training.progress import is_first_process

Line = dict[str, Any]


def check_output(path: Path) -> None:
    """Raise IsotuneError for a file that predictions could not be written to."""
    if path.suffix not in (".csv", ".jsonl"):
        raise IsotuneError(f"predictions cannot be written to {path}: name a .csv or a .jsonl file")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise IsotuneError(f"predictions cannot be written to {path}: no such folder to write it in")


@contextmanager
def writing_lines(path: Path | None) -> Iterator[Callable[[Sequence[Line]], None]]:
    """Yields the function that writes lines with the same keys, as CSV or JSON by the file's ending.

    Until the end they are in a file beside it, which is removed where anything fails; only the first process writes.
    Without a path they go to standard output at once, as JSON. Raises IsotuneError where the disk is full.
    """
    if not is_first_process():
        yield lambda lines: None
        return
    if path is None:
        try:
            yield lambda lines: _json(sys.stdout, lines)
        except BrokenPipeError:  # whoever reads has seen enough, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            yield _Table(file) if path.suffix == ".csv" else lambda lines: _json(file, lines)
        sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise IsotuneError(f"predictions cannot be written to {path}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def _json(file: IO[str], lines: Sequence[Line]) -> None:
    file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    file.flush()


class _Table:
    """Writes CSV, its header from the first line."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file
        self.writer: csv.DictWriter[str] | None = None

    def __call__(self, lines: Sequence[Line]) -> None:
        if lines and self.writer is None:
            self.writer = csv.DictWriter(self.file, fieldnames=list(lines[0]), lineterminator="\n")
            self.writer.writeheader()
        if self.writer is not None:
            self.writer.writerows({key: _flat(value) for key, value in line.items()} for line in lines)


def _flat(value: Any) -> Any:
    """Lists and records as JSON, which other programs read back."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else value
