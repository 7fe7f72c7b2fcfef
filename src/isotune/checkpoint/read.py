"""Read an adapter folder, isotune's or PEFT's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from isotune.adapters.peft.dialect import dialect_of
from isotune.adapters.registry import method_class
from isotune.checkpoint.files import CONFIG, TENSORS, read_adapter
from isotune.checkpoint.read_diffusers import diffusers_file, read_diffusers
from isotune.checkpoint.read_peft import read_peft
from isotune.checkpoint.stored import PREFIX, OnDisk, State, StoredAdapter, check_shared, own_type, split_shared
from isotune.errors import CheckpointError, OptionError
from isotune.sites import current_entry


def read_stored(
    path: str | Path, in_memory: bool = True, known: Mapping[str, nn.Module] | None = None
) -> StoredAdapter:
    """Read and check the adapter folder at `path`.

    Where many adapters are read, `in_memory=False` keeps the tensors of none; see `OnDisk`. `known`, a model's
    modules by path, tell which of several parts a file of diffusers is to be read for, and which layers a folder of
    PEFT's is for that does not say so.

    Raises CheckpointError for a folder that is no adapter, is damaged, incomplete, holds too much, or is of a
    method that is not known.
    """
    path = Path(path)
    file = diffusers_file(path)
    try:
        config, tensors, header = read_adapter(path) if file is None else (*read_diffusers(file, known), None)
        if header is not None:
            found = _from_isotune(path, config, tensors, header)
        else:
            found = read_peft(path, config, tensors, known)
    except OptionError as error:
        raise CheckpointError(f"{path} cannot be loaded: {error}") from None
    except (KeyError, TypeError, AttributeError, StopIteration, IndexError, RuntimeError) as error:
        raise CheckpointError(f"the config or header of {path} is damaged: {error!r}") from None
    return found if in_memory or file is not None else _on_disk(found, tensors)


def holds_adapter(path: str | Path) -> bool:
    """Whether `path` is that of an adapter: isotune's, PEFT's or diffusers'."""
    return (Path(path) / CONFIG).is_file() or diffusers_file(Path(path)) is not None


def _on_disk(stored: StoredAdapter, tensors: Mapping[str, Tensor]) -> StoredAdapter:
    """The same, with none of the tensors of the file in memory but copies of those that are of no adapted layer."""
    keys = {id(tensor): key for key, tensor in tensors.items()}
    return replace(
        stored,
        state=OnDisk(
            stored.path / TENSORS,
            {p: {name: keys[id(tensor)] for name, tensor in own.items()} for p, own in stored.state.items()},
        ),
        # A tensor as it was read is a view of the whole file.
        trained={p: _copies(own) for p, own in stored.trained.items()},
        shared=_copies(stored.shared),
        base_weights=_copies(stored.base_weights),
        rows={p: (indices, values.clone()) for p, (indices, values) in stored.rows.items()},
    )


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _from_isotune(
    path: Path, config: dict[str, Any], tensors: dict[str, Tensor], header: dict[str, Any]
) -> StoredAdapter:
    sites, trained_paths = header["sites"], header["trained"]
    state: State = defaultdict(dict)
    trained: State = {p: {} for p in trained_paths}
    shared, tensors = split_shared(tensors)
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        owner = _owner(name, sites) or _owner(name, trained_paths)
        if owner is None:
            raise CheckpointError(f"{path} holds {key!r}, which belongs to no layer that its header names")
        (trained if owner in trained else state)[owner][name.removeprefix(f"{owner}.")] = tensor
    if missing := sorted(sites.keys() - state.keys()):
        raise CheckpointError(f"{path} is incomplete: it has no tensors for {missing[0]!r}")
    if not sites:
        return StoredAdapter(path, config, header, {}, {}, trained, {})
    method = method_class(header["method"])
    if config["peft_type"] not in (dialect_of(method).peft_type, own_type(method.name)):
        raise CheckpointError(
            f"{path}: the config says {config['peft_type']!r}, but the tensors are those of {method.name!r}; "
            "the folder mixes two adapters"
        )
    sites = {p: current_entry(entry) for p, entry in sites.items()}
    header = {**header, "sites": sites}
    settings = {p: method(**site.get("settings", header["settings"])) for p, site in sites.items()}
    check_shared(path, next(iter(settings.values())), shared)
    return StoredAdapter(path, config, header, settings, dict(state), trained, shared)


def _owner(name: str, paths: Any) -> str | None:
    """The longest of `paths` that `name` lies under."""
    parts = name.split(".")
    return next((p for end in range(len(parts) - 1, 0, -1) if (p := ".".join(parts[:end])) in paths), None)
