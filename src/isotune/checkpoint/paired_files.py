"""A JSON index and the tensors it speaks of, as two files that vouch for each other: NAME.json, NAME.safetensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from isotune.adapters.contract import check_tensors
from isotune.checkpoint.files import digest
from isotune.errors import CheckpointError
from isotune.version import __version__

FORMAT = 1
Shapes = dict[str, tuple[int, ...]]


def write_sealed(folder: Path, name: str, index: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write both files into a folder that exists; the index must be JSON."""
    # Copies: two tensors of the file must not share memory.
    copies = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    save_file(copies, folder / f"{name}.safetensors", metadata={"format": "pt"})
    index = {"format": FORMAT, "isotune": __version__, **index}
    text = json.dumps({**index, "digest": _seal(index, copies)}, indent=1, allow_nan=False)
    (folder / f"{name}.json").write_text(text + "\n")


def read_sealed(
    folder: Path, name: str, shapes: Callable[[dict[str, Any]], Shapes]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The index and the tensors, of which `shapes` tells what the index promises.

    Raises CheckpointError for files that are missing, truncated, altered, of another format or do not agree.
    """
    file, values = folder / f"{name}.json", folder / f"{name}.safetensors"
    try:
        index = json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{folder} holds no {file.name}; it is no folder of this kind, or incomplete") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    if not isinstance(index, dict) or not {"format", "digest"} <= index.keys():
        raise CheckpointError(f"{file} is damaged; restore it from its source")
    if index["format"] != FORMAT:
        raise CheckpointError(
            f"{file} has format version {index['format']}, this isotune reads version {FORMAT}; upgrade isotune"
        )
    try:
        tensors = load_file(values)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{values} cannot be read ({error}); it is missing, truncated or damaged") from None
    sealed = index.pop("digest")
    if sealed != _seal(index, tensors):
        raise CheckpointError(f"{file} and {values.name} do not match their digest: one was damaged or altered")
    try:
        check_tensors(tensors, shapes(index))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{file} and {values.name} do not agree: {error!r}") from None
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{values} holds values that are not finite (NaN or infinity) in {key}")
    return index, tensors


def _seal(index: Mapping[str, Any], tensors: dict[str, Tensor]) -> str:
    # In the order as it is: the order of names in an index may tell which tensor is whose.
    text = json.dumps(index) + digest(tensors)
    return hashlib.sha256(text.encode()).hexdigest()
