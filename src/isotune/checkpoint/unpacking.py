"""Models in formats that transformers does not load: rewritten once into a folder that it does, kept in a cache.

By the SHA-256 of the file, under `$ISOTUNE_CACHE` or `~/.cache/isotune`.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from isotune.checkpoint.files import replaced_folder
from isotune.errors import CheckpointError
from isotune.folders import MODEL_CONFIG
from isotune.locks import lock


def unpacked_by(unpack: Callable[[Path, Path], None], file: Path, kind: str) -> Path:
    """The folder of a file's model, which `unpack(file, folder)` fills where it is not there yet.

    Raises CheckpointError where the file cannot be read or the cache cannot be written.
    """
    folder = _cache() / kind / _digest(file)
    if not (folder / MODEL_CONFIG).is_file():
        with _alone(folder.with_suffix(".lock")):
            if not (folder / MODEL_CONFIG).is_file():
                with replaced_folder(folder, replaces=None) as new:
                    unpack(file, new)
    return folder


def _digest(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()[:32]
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None


def _cache() -> Path:
    return Path(os.environ.get("ISOTUNE_CACHE") or Path.home() / ".cache" / "isotune").expanduser()


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Wait until no other process is at it."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        stream = file.open("w")
    except OSError as error:
        raise CheckpointError(
            f"the cache of unpacked models cannot be written ({error}); name a folder with ISOTUNE_CACHE=..."
        ) from None
    with stream:
        while True:
            try:
                lock(stream)
                break
            except BlockingIOError:
                time.sleep(0.2)
        yield
