"""Model folders as files: what is in them by their headers, and their tensors one at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from isotune.checkpoint.base import StoredBase, read_tensor
from isotune.errors import CheckpointError
from isotune.folders import MODEL_CONFIG

CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
"""safetensors' names of the dtypes that are read and written."""
_DTYPES = {code: dtype for dtype, code in CODES.items()}


class Header(NamedTuple):
    """What the header of a file says of a tensor."""

    code: str
    """The dtype, in safetensors' words."""
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype, or None for one that is not merged (fp8 and the like)."""
        return _DTYPES.get(self.code)

    @property
    def floating(self) -> bool:
        """Whether it is merged; integers and booleans are copied."""
        return self.dtype is not None and self.dtype.is_floating_point


@dataclass
class StoredModel:
    """A transformers model folder, read by its headers."""

    label: str
    """What messages call it."""
    folder: Path
    config: dict[str, Any]
    file_of: dict[str, str]
    headers: dict[str, Header]
    fingerprint: dict[str, list[Any]]
    """Of each file: size in bytes, time of change (ns), SHA-256 of the header."""
    aliases: dict[str, str]
    """Names that the files' metadata give to the tensor of another name."""
    shared: dict[str, str] = field(default_factory=dict)
    """Names that are not stored because the tensor of another name is theirs, too."""
    copies: dict[str, list[str]] = field(default_factory=dict)
    """Tied names that are stored a second time, by the name that is merged."""

    def holds(self, name: str) -> bool:
        """Whether there is a tensor of that name, perhaps stored under another."""
        return name in self.headers or name in self.shared

    def header(self, name: str) -> Header:
        """The header of that tensor."""
        return self.headers[self.shared.get(name, name)]

    def tensor(self, name: str) -> Tensor:
        """That tensor as stored, lazily read. Raises CheckpointError for NaN, infinity, or a copy that differs."""
        found = self._stored(self.shared.get(name, name))
        if found.is_floating_point() and found.numel() and not all(x.isfinite() for x in found.aminmax()):
            raise CheckpointError(
                f"{name!r} of {self.label} ({self.folder}) holds values that are not finite (NaN or infinity); "
                "leave this model out, or restore the file from its source"
            )
        for copy in self.copies.get(name, ()):
            if not self._stored(copy).equal(found):
                raise CheckpointError(
                    f"config.json of {self.label} ({self.folder}) ties {copy!r} to {name!r}, but the two differ in "
                    "its files; if they are meant to differ, set tie_word_embeddings to false in its config.json"
                )
        return found

    def _stored(self, name: str) -> Tensor:
        return read_tensor(self.folder / self.file_of[name], name)


def read_model(name: str | Path, label: str) -> StoredModel:
    """A model by its headers, from a folder or the hub. Raises CheckpointError where it cannot be read."""
    path = Path(name)
    if path.is_dir() and not any((path / f"model.safetensors{end}").is_file() for end in ("", ".index.json")):
        raise CheckpointError(
            f"{label} ({path}) holds no model.safetensors; weights in other files (such as pytorch_model.bin) are "
            "not read: load the model with transformers and save it again"
        )
    try:
        stored = StoredBase(name)
        config = stored.config()
    except CheckpointError as error:
        raise CheckpointError(f"{label} ({name}): {error}") from None
    if not config:
        raise CheckpointError(f"{label} ({name}) is no model folder: it holds no {MODEL_CONFIG}")
    headers: dict[str, Header] = {}
    aliases: dict[str, str] = {}
    fingerprint = {}
    for file in sorted(set(stored.file_of.values())):
        found, metadata, fingerprint[file] = read_header(stored.folder / file, label)
        headers |= found
        aliases |= {alias: own for alias, own in metadata.items() if own in found and alias not in found}
    lacking = sorted(set(stored.file_of) - headers.keys())
    if lacking:
        raise CheckpointError(f"{label} ({name}): its index names tensors that its files lack: {', '.join(lacking)}")
    headers = {key: headers[key] for key in headers if key in stored.file_of}
    return StoredModel(label, stored.folder, config, stored.file_of, headers, fingerprint, aliases, dict(aliases))


def read_header(file: Path, label: str) -> tuple[dict[str, Header], Mapping[str, str], list[Any]]:
    """The tensors, the metadata and the fingerprint of a safetensors file. Raises CheckpointError if it is none."""
    try:
        with safe_open(file, framework="pt"):
            pass  # refuses what is truncated or no safetensors file
        with open(file, "rb") as opened:
            header = opened.read(int.from_bytes(opened.read(8), "little"))
        status = file.stat()
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{label}: {file} cannot be read ({error}); it is missing or truncated") from None
    entries = json.loads(header)
    metadata = entries.pop("__metadata__", None) or {}
    found = {name: Header(entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}
    return found, metadata, [status.st_size, status.st_mtime_ns, hashlib.sha256(header).hexdigest()]
