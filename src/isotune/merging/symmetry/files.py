"""Whole checkpoints on disk, read by name and rewritten in place, one tensor at a time."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from isotune.checkpoint.base import StoredBase, read_tensor
from isotune.errors import CheckpointError
from isotune.folders import MODEL_CONFIG

PREFIX = "model."
"""What stands before the names of a model with a head."""


class Tensors(Mapping[str, Tensor]):
    """A model's tensors on disk by name, without the `model.` that only models with a head have; read when asked."""

    def __init__(self, name: str | Path) -> None:
        self.base = StoredBase(name)
        self.folder = self.base.folder
        self.stored_as = {key.removeprefix(PREFIX): key for key in self.base.file_of}
        self.config = self.base.config()
        if not self.config:
            raise CheckpointError(f"{self.folder} is no model folder: it holds no {MODEL_CONFIG}")

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored_as)

    def __len__(self) -> int:
        return len(self.stored_as)

    def __getitem__(self, name: str) -> Tensor:
        key = self.stored_as[name]
        return read_tensor(self.folder / self.base.file_of[key], key)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, which is not read."""
        return tuple(self.base.stored_shape(self.stored_as[name]))


def rewrite(file: Path, new: Callable[[str], Tensor | None]) -> None:
    """Replace tensors of a safetensors file by others of the same shape and dtype; None leaves one as it is.

    Names are given without their prefix. The file keeps its header, so that one tensor at a time is in memory.
    """
    with file.open("r+b") as stream:
        # A file is the length of the header, the header, and the values at the offsets that it tells.
        length = struct.unpack("<Q", stream.read(8))[0]
        header = json.loads(stream.read(length))
        for key in header.keys() - {"__metadata__"}:
            tensor = new(key.removeprefix(PREFIX))
            if tensor is not None:
                values = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
                start, end = header[key]["data_offsets"]
                if end - start != len(values):
                    raise ValueError(f"{key} has {end - start} bytes in {file}, and would get {len(values)}")
                stream.seek(8 + length + start)
                stream.write(values)
