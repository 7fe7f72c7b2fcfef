"""An adapter folder, isotune's or PEFT's, understood without a model: which layers, which settings, which tensors."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from isotune.adapters.registry import method_class, method_names
from isotune.adapters.settings import Settings
from isotune.checkpoint.base_record import BaseRecord
from isotune.checkpoint.files import TENSORS, read_adapter
from isotune.errors import CheckpointError, OptionError
from isotune.sites import current_entry

MODEL = "base_model."  # before what a model's adapters share
PREFIX = "base_model.model."  # before the path of a module
_ROWS = ".token_adapter.trainable_tokens_delta"
FULL = "full"  # the method of an adapter that only trains modules in full

State = dict[str, dict[str, Tensor]]  # by module path, then by the tensor's name there


class BaseTensors(Protocol):
    """A base that can be asked for the tensors of its modules."""

    def state(self, path: str) -> Mapping[str, Tensor]:
        """Weight and bias of the module at `path`, as far as there are any."""

    def tied(self, path: str) -> Iterable[str]:
        """The other modules that have the weight of the module at `path`."""


@dataclass(frozen=True)
class StoredAdapter:
    """What an adapter folder holds."""

    path: Path
    config: dict[str, Any]
    header: dict[str, Any] | None
    """What isotune adds in the safetensors header; None where PEFT wrote the file."""
    settings: dict[str, Settings]
    """The settings of each adapted layer, by path."""
    state: Mapping[str, dict[str, Tensor]]
    """The adapters' tensors."""
    trained: State
    """The tensors of the modules trained in full."""
    shared: dict[str, Tensor]
    """What the adapters of all layers have in common."""
    base_weights: dict[str, Tensor] = field(default_factory=dict)
    """Embeddings and heads as PEFT stores them beside an adapter: adapted ones, and those with added tokens."""
    rows: dict[str, tuple[list[int], Tensor]] = field(default_factory=dict)
    """The rows of an embedding or head that PEFT trained (`trainable_token_indices`), and their values, by path."""

    @property
    def method(self) -> str:
        """The name of the method, or "full"."""
        return next(iter(self.settings.values())).name if self.settings else FULL

    @property
    def base(self) -> BaseRecord:
        """What is said of its base."""
        name, task = (self.config.get(key) for key in ("base_model_name_or_path", "task_type"))
        return BaseRecord(name, (self.header or {}).get("base_config", ""), task)

    @property
    def in_full(self) -> list[str]:
        """The paths of the modules of which it has other values than the base, or may have."""
        return sorted({*self.trained, *self.rows, *(self.base_weights.keys() - self.settings.keys())})

    def completed(self, base: BaseTensors | None) -> StoredAdapter:
        """The same with what PEFT stored of embeddings and heads as modules trained in full.

        Weights that the base has as they are stored are left out; without a base none is. Raises CheckpointError
        where only the base has what is beside the rows.
        """
        trained = dict(self.trained)
        for path, (indices, values) in self.rows.items():
            if base is None:
                raise CheckpointError(
                    f"{self.path} holds {len(indices)} trained rows of {path!r}, and the rest of it is in the base: "
                    "name that with base=... (--base)"
                )
            # PEFT trains the rows of all modules that share a weight, and stores them once.
            for p in (path, *(tied for tied in base.tied(path) if tied not in self.rows)):
                state = base.state(p)
                trained[p] = {**state, "weight": _with_rows(state["weight"], indices, values)}
        kept = {}
        for path, weight in self.base_weights.items():
            state = {} if base is None else base.state(path)
            if path in self.settings:
                kept[path] = weight
            elif "weight" not in state or not is_equal(weight, state["weight"]):
                trained[path] = {**state, "weight": weight}
        return replace(self, trained=trained, base_weights=kept, rows={})


class OnDisk(Mapping[str, dict[str, Tensor]]):
    """The state of an adapter of which nothing stays in memory: a layer's tensors are read when it is asked for.

    Raises CheckpointError where the file is not the one that it was when this was made.
    """

    def __init__(self, file: Path, keys: Mapping[str, Mapping[str, str]]) -> None:
        """`keys`: by layer and by the tensor's name there, its name in the file."""
        self.file, self.keys_of = file, keys
        self.version = self._version()

    def __getitem__(self, path: str) -> dict[str, Tensor]:
        keys = self.keys_of[path]
        try:
            if self._version() != self.version:
                raise CheckpointError(f"{self.file} was changed while it was being read; start again")
            with safe_open(self.file, framework="pt") as opened:
                return {name: opened.get_tensor(key) for name, key in keys.items()}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.file} cannot be read any more: {error}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_of)

    def __len__(self) -> int:
        return len(self.keys_of)

    def __contains__(self, path: object) -> bool:
        return path in self.keys_of

    def _version(self) -> tuple[int, int, int]:
        found = self.file.stat()
        return found.st_ino, found.st_mtime_ns, found.st_size


def read_stored(path: str | Path, in_memory: bool = True) -> StoredAdapter:
    """Read and check the adapter folder at `path`.

    Where many adapters are read, `in_memory=False` keeps the tensors of none; see `OnDisk`.

    Raises CheckpointError for a folder that is no adapter, is damaged, incomplete, holds too much, or is of a
    method that is not known.
    """
    path = Path(path)
    config, tensors, header = read_adapter(path)
    try:
        if header is not None:
            found = _from_isotune(path, config, tensors, header)
        else:
            found = _from_peft(path, config, tensors)
    except OptionError as error:
        raise CheckpointError(f"{path} cannot be loaded: {error}") from None
    except (KeyError, TypeError, AttributeError, StopIteration, IndexError, RuntimeError) as error:
        raise CheckpointError(f"the config or header of {path} is damaged: {error!r}") from None
    return found if in_memory else _on_disk(found, tensors)


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
    shared, tensors = _split_shared(tensors)
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
    if config["peft_type"] not in (method.peft_type, own_type(method.name)):
        raise CheckpointError(
            f"{path}: the config says {config['peft_type']!r}, but the tensors are those of {method.name!r}; "
            "the folder mixes two adapters"
        )
    sites = {p: current_entry(entry) for p, entry in sites.items()}
    header = {**header, "sites": sites}
    settings = {p: method(**site.get("settings", header["settings"])) for p, site in sites.items()}
    _check_shared(path, next(iter(settings.values())), shared)
    return StoredAdapter(path, config, header, settings, dict(state), trained, shared)


def _owner(name: str, paths: Any) -> str | None:
    """The longest of `paths` that `name` lies under."""
    parts = name.split(".")
    return next((p for end in range(len(parts) - 1, 0, -1) if (p := ".".join(parts[:end])) in paths), None)


def _from_peft(path: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> StoredAdapter:
    method = _method_of(config, path)
    prefix = method.peft_prefix or f"{method.name}_"
    prefix_there = method.peft_aliases.get(config["peft_type"], prefix)
    if config.get("bias", "none") != "none":
        raise OptionError(f"its config has bias={config['bias']!r}; trained biases are not supported")
    state: State = defaultdict(dict)
    trained: State = defaultdict(dict)
    base_weights: dict[str, Tensor] = {}
    rows: dict[str, tuple[list[int], Tensor]] = {}
    in_full = config.get("modules_to_save") or []
    shared, tensors = _split_shared(tensors)
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        layer, mark, tensor_name = name.rpartition(f".{prefix_there}")
        module = next((m for full in in_full if (m := re.match(rf"(?:.*?\.)?{re.escape(full)}(?=\.)", name))), None)
        if mark and f"{prefix}{tensor_name}" in shared:
            # Some versions of PEFT store what the layers share with each layer, too.
            if not tensor.equal(shared[f"{prefix}{tensor_name}"]):
                raise CheckpointError(f"{path} holds {key!r}, which differs from what all layers share")
        elif mark:
            state[layer][f"{prefix}{tensor_name}"] = tensor
        elif name.endswith(_ROWS):
            p = name.removesuffix(_ROWS)
            rows[p] = _indices(config, p), tensor
        elif name.endswith(".base_layer.weight"):
            base_weights[name.removesuffix(".base_layer.weight").removesuffix(".token_adapter")] = tensor
        elif module is not None:
            # Of an embedding PEFT stores its wrapper as well: the values of before, and the trained ones twice.
            tensor_name = name.removeprefix(f"{module.group()}.").removeprefix("modules_to_save.")
            if not tensor_name.startswith("original_module."):
                trained[module.group()][tensor_name] = tensor
        elif tensor.dim() == 2 and name.endswith(".weight") and not _of_an_adapter(name):
            base_weights[name.removesuffix(".weight")] = tensor  # an embedding, where tokens were added
        else:
            raise CheckpointError(
                f"{path} holds {key!r}, which is no tensor of {config['peft_type']!r} and of no module to save"
            )
    names = _own_names(state)
    others = {key: value for key, value in config.items() if key != "trainable_token_indices"}
    settings = {own: method.from_peft_config(others, p) for p, own in names.items()}
    state = {own: state[p] for p, own in names.items()}
    if not settings:
        raise CheckpointError(f"{path} is incomplete: it has no tensors of its type, {config['peft_type']!r}")
    _check_shared(path, next(iter(settings.values())), shared)
    # Where the embeddings were resized, the weight around the rows is in the file as well.
    for p in rows.keys() & base_weights.keys():
        trained[p]["weight"] = _with_rows(base_weights.pop(p), *rows.pop(p))
    return StoredAdapter(path, config, None, settings, dict(state), dict(trained), shared, base_weights, rows)


def _of_an_adapter(name: str) -> bool:
    """Whether the tensor of this name would be one of some method that PEFT has."""
    prefixes = tuple(method_class(method).peft_prefix or f"{method}_" for method in method_names())
    return any(part.startswith(prefixes) for part in name.split("."))


def _indices(config: dict[str, Any], p: str) -> list[int]:
    """Which rows of the embedding at p PEFT trained: one list for all, or one for each name."""
    indices = config["trainable_token_indices"]
    if isinstance(indices, dict):
        indices = next(found for name, found in indices.items() if p == name or p.endswith(f".{name}"))
    return list(indices)


def is_equal(stored: Tensor, own: Tensor) -> bool:
    """Whether a base has this weight, in the dtype that it is in there."""
    return stored.shape == own.shape and stored.to(own.dtype).equal(own.cpu())


def _with_rows(weight: Tensor, indices: list[int], values: Tensor) -> Tensor:
    """A copy of the weight with other values in the rows of these indices."""
    return weight.index_copy(0, torch.tensor(indices, device=weight.device), values.to(weight))


def _own_names(paths: Iterable[str]) -> dict[str, str]:
    """The paths in PEFT's file with those that isotune has for the same: PEFT adapts nn.MultiheadAttention whole."""
    inner = ".base_layer.out_proj"
    whole = {p.removesuffix(inner) for p in paths if p.endswith(inner)}
    return {p: f"{p}.in_proj_weight" if p in whole else p.replace(inner, ".out_proj") for p in paths}


def _split_shared(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of the model as a whole, without their prefix, and those of its modules."""
    shared = {
        k.removeprefix(MODEL): t for k, t in tensors.items() if k.startswith(MODEL) and not k.startswith(PREFIX)
    }
    return shared, {k: t for k, t in tensors.items() if k.removeprefix(MODEL) not in shared}


def _check_shared(path: Path, settings: Settings, shared: dict[str, Tensor]) -> None:
    if settings.stores_shared and not shared:
        raise CheckpointError(f"{path} is incomplete: what {settings.name} shares among all layers is missing")
    if shared and not settings.stores_shared:
        names = ", ".join(shared)
        raise CheckpointError(f"{path} holds {names}, which its {settings.name} adapter does not store")


def own_type(method: str) -> str:
    """The `peft_type` of an adapter that PEFT cannot load."""
    return f"ISOTUNE_{method.upper()}"


def _method_of(config: dict[str, Any], path: Path) -> type[Settings]:
    """The method that claims the config, or the first of its type."""
    peft_type = config["peft_type"]
    known = [method_class(name) for name in method_names()]
    of_type = [m for m in known if peft_type == m.peft_type or peft_type in m.peft_aliases]
    if of_type:
        return next((m for m in of_type if m.claims_peft_config(config)), of_type[0])
    types = dict.fromkeys(t for m in known for t in (m.peft_type, *m.peft_aliases) if t)
    raise CheckpointError(
        f"{path} is a PEFT adapter of type {peft_type!r}; the types that can be read are: {', '.join(types)}"
    )
