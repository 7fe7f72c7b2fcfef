"""Folders that are written whole or not at all, and tensors that are read with suspicion."""

from __future__ import annotations

import ctypes
import filecmp
import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from isotune.errors import CheckpointError

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
CARD = "README.md"
FORMAT = 1
OURS = {CONFIG, TENSORS, CARD}
Statistic = Literal["fisher", "second_moment"]
STATISTICS: dict[Statistic, str] = {"fisher": "fisher.safetensors", "second_moment": "second_moment.safetensors"}
"""What may lie beside an adapter for merging: statistics of its weights, which are of no use to another adapter."""
TEMPORARY = ".isotune-"
"""How the names of files begin that are written to be renamed."""


def check_writable(path: str | Path, replaces: str | None = CONFIG) -> Path:
    """Raise CheckpointError unless a folder can be written at `path`.

    It may be absent or empty, or one that holds a file called `replaces`, which marks an older one of its kind.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"cannot write to {path}: it is a file; name a folder")
    if path.is_dir() and any(path.iterdir()) and not (replaces and (path / replaces).exists()):
        missing = f" (no {replaces} in it)" if replaces else ""
        raise CheckpointError(
            f"cannot write to {path}: the folder exists and holds something else{missing}; "
            "name a new folder, or empty this one"
        )
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"cannot write to {path}: no folder can be made in {parent}")
    return path


@contextmanager
def replaced_folder(path: str | Path, replaces: str | None = CONFIG, without: Collection[str] = ()) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to write into; on success it takes the place of `path` in one step.

    Files of an older folder that are not an adapter's, nor called as in `without`, are carried over, statistics of
    its weights only where the tensors are still the same. Whatever fails, the older folder stays.
    Raises CheckpointError where the disk is full or the folder not writable.
    """
    path = check_writable(path, replaces).absolute()
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        temporary.chmod(0o755)
        yield temporary
        if path.exists():
            _carry_over(path, temporary, without)
        for file in temporary.iterdir():
            if file.is_file():
                sync(file)
        sync(temporary)
        _put_in_place(temporary, path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"could not write {path}: {error}; nothing there was changed. Free some space or choose another folder."
        ) from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _carry_over(old: Path, new: Path, without: Collection[str]) -> None:
    both = (old / TENSORS).is_file() and (new / TENSORS).is_file()
    same = both and filecmp.cmp(old / TENSORS, new / TENSORS, shallow=False)
    left = OURS.union(without, () if same else STATISTICS.values())
    for entry in old.iterdir():
        if entry.name not in left and not (new / entry.name).exists():
            if entry.is_dir():
                shutil.copytree(entry, new / entry.name, symlinks=True)
            else:
                shutil.copy2(entry, new / entry.name)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, text: str) -> None:
    """Write a small text file so that a crash leaves the old one or the new one.

    Raises:
        CheckpointError: The file cannot be written; the disk may be full.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from None


def _put_in_place(new: Path, path: Path) -> None:
    """Rename `new` to `path`. Where `path` exists the two are exchanged, and `new` then holds the older folder."""
    if not path.exists():
        new.rename(path)
    elif not _exchange(new, path):
        # No atomic exchange on this system: between the two renames only the sibling folders exist.
        aside = new.with_suffix(".old")
        path.rename(aside)
        new.rename(path)
        aside.rename(new)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two names in one step (Linux); False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0


def digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def write_adapter(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], header: dict[str, Any] | None = None
) -> None:
    """Write config and tensors of an adapter into `folder`; the digest of the tensors is added to the header."""
    if empty := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise CheckpointError(
            f"{empty[0]} is on the meta device: it has no values to save; give the model its weights"
        )
    tensors = _apart({name: _whole(tensor.detach()).cpu().contiguous() for name, tensor in tensors.items()})
    # One key only: safetensors writes several in any order, and the same adapter should give the same bytes.
    metadata = {"format": "pt"}
    if header is not None:
        metadata = {"isotune": json.dumps({**header, "digest": digest(tensors)}, sort_keys=True)}
    save_file(tensors, folder / TENSORS, metadata=metadata)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _whole(tensor: Any) -> Tensor:
    """The tensor, gathered where FSDP2 has sharded it: every process has to ask."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, copied where two of them share memory or one is part of a larger one: no file may hold such."""
    owners = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())
    return {
        name: tensor.clone()
        if owners[tensor.untyped_storage().data_ptr()] > 1 or tensor.untyped_storage().nbytes() != tensor.nbytes
        else tensor
        for name, tensor in tensors.items()
    }


def read_adapter(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any] | None]:
    """The config, the tensors and, where isotune wrote it, the header of the adapter folder at `path`.

    Raises CheckpointError for a folder that is no adapter, is truncated, altered, or holds non-finite values.
    """
    path = Path(path)
    config = _read_config(path)
    file = path / TENSORS
    if (path / PICKLED).is_file() and not file.is_file():
        raise CheckpointError(
            f"{path} holds {PICKLED}, a pickle, and pickles are not read: they can run any code. Convert it once: "
            f'safetensors.torch.save_file(torch.load("{PICKLED}", weights_only=True), "{TENSORS}")'
        )
    if not file.is_file():
        raise CheckpointError(f"{path} holds no {TENSORS}; the folder is incomplete")
    tensors, metadata = read_tensors(file)
    try:
        header = json.loads(metadata["isotune"]) if "isotune" in metadata else None
    except json.JSONDecodeError:
        raise CheckpointError(f"the header of {file} is damaged; restore the file from its source") from None
    if header is not None:
        _check_header(header, tensors, file)
    check_finite(tensors, file)
    return config, tensors, header


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file, and its metadata. Raises CheckpointError where it cannot be read."""
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
            return tensors, opened.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); it is truncated or no safetensors file") from None


def check_finite(tensors: dict[str, Tensor], file: Path) -> None:
    """Raise CheckpointError for values that are NaN or infinite."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{file} holds values that are not finite (NaN or infinity) in {name}")


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise CheckpointError(f"there is no adapter folder {path}")
    try:
        config = json.loads((path / CONFIG).read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is no adapter folder: it holds no {CONFIG}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
        raise CheckpointError(f"{path / CONFIG} cannot be read: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise CheckpointError(f"{path / CONFIG} names no peft_type; it is no adapter's config")
    return config


def _check_header(header: Any, tensors: dict[str, Tensor], file: Path) -> None:
    needed = {"format", "method", "settings", "sites", "trained", "base_config", "digest"}
    if not isinstance(header, dict) or not needed <= header.keys():
        raise CheckpointError(f"the header of {file} is damaged; restore the file from its source")
    if header["format"] != FORMAT:
        raise CheckpointError(
            f"{file} has format version {header['format']}, this isotune reads version {FORMAT}; upgrade isotune"
        )
    if header["digest"] != digest(tensors):
        raise CheckpointError(f"the tensors in {file} do not match their digest: the file was damaged or altered")
