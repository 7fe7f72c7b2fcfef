"""Files that one process at a time may have open for writing."""

from __future__ import annotations

from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps two processes apart
    fcntl = None  # type: ignore[assignment]


def lock(file: IO[Any]) -> None:
    """Keep other processes out until the file is closed. Raises BlockingIOError where one has it."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
