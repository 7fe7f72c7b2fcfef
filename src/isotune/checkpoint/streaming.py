"""Model files written as a stream: one tensor after another, with only one of them in memory.

The safetensors format puts a header with all names, dtypes, shapes and offsets before the data, so that a file of any
size can be written while its tensors are still being computed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from isotune.checkpoint.files import write_atomically
from isotune.checkpoint.stored_models import CODES
from isotune.errors import CheckpointError, OptionError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class Entry(NamedTuple):
    """A tensor that a file will hold."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return prod(self.shape) * self.dtype.itemsize


class Shard(NamedTuple):
    """A file with the tensors in it, in the order in which it holds them."""

    file: str
    entries: list[Entry]


def parse_size(size: int | str) -> int:
    """Bytes, from a number or a text such as "5GB". Raises OptionError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)?", str(size).strip().upper())
    if found is None or float(found[1]) <= 0:
        raise OptionError(f"max_shard_size={size!r} is not usable; write a size such as '5GB' or '500MB'")
    return int(float(found[1]) * _UNITS[found[2] if found[2] and found[2] != "B" else ""])


def by_size(entries: Iterable[Entry], most: int) -> list[Shard]:
    """Files of at most that many bytes each, unless a single tensor is larger."""
    groups: list[list[Entry]] = []
    for entry in entries:
        if not groups or sum(e.nbytes for e in groups[-1]) + entry.nbytes > most:
            groups.append([])
        groups[-1].append(entry)
    if len(groups) == 1:
        return [Shard("model.safetensors", _aligned(groups[0]))]
    return [
        Shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", _aligned(group))
        for number, group in enumerate(groups, 1)
    ]


def by_file(entries: Iterable[Entry], file_of: Mapping[str, str]) -> list[Shard]:
    """The files that the tensors come from."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(file_of[entry.name], []).append(entry)
    return [Shard(file, _aligned(group)) for file, group in sorted(groups.items())]


def _aligned(entries: list[Entry]) -> list[Entry]:
    """Wide dtypes first, so that every tensor starts at a multiple of its items' size."""
    return sorted(entries, key=lambda entry: -entry.dtype.itemsize)


def write_shard(
    path: Path, entries: Sequence[Entry], tensor: Callable[[Entry], Tensor], aliases: Mapping[str, str]
) -> str:
    """Write a file with what `tensor` gives for each entry, one at a time; returns its SHA-256.

    `aliases` are further names for tensors of the model; those of this file go into its metadata.
    """
    names = {entry.name for entry in entries}
    header: dict[str, object] = {"__metadata__": {"format": "pt"} | {a: o for a, o in aliases.items() if o in names}}
    end = 0
    for entry in entries:
        start, end = end, end + entry.nbytes
        header[entry.name] = {
            "dtype": CODES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    sha = hashlib.sha256()
    with open(path, "wb") as file:
        for part in (len(text).to_bytes(8, "little"), text):
            file.write(part)
            sha.update(part)
        for entry in entries:
            found = tensor(entry)
            assert found.dtype == entry.dtype, f"{entry.name}: {found.dtype}, not {entry.dtype}"
            assert found.shape == entry.shape, f"{entry.name}: {tuple(found.shape)}, not {entry.shape}"
            data = found.contiguous().reshape(-1).view(torch.uint8).numpy().data
            file.write(data)
            sha.update(data)
            del found, data
        file.flush()
        os.fsync(file.fileno())
    return sha.hexdigest()


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """Write the index of a model in more than one file."""
    if [shard.file for shard in shards] == ["model.safetensors"]:
        return
    weight_map = {entry.name: shard.file for shard in shards for entry in shard.entries}
    size = sum(entry.nbytes for shard in shards for entry in shard.entries)
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    write_atomically(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def check_digest(path: Path, expected: str) -> None:
    """Raise CheckpointError unless the file has that SHA-256."""
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(
            f"{path} of the interrupted merge cannot be read ({error.strerror}); remove {path.parent.parent} and "
            "merge again"
        ) from None
    if found != expected:
        raise CheckpointError(
            f"{path} of the interrupted merge was altered or damaged; remove {path.parent.parent} and merge again"
        )
