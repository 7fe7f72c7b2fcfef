"""What an adapter folder holds, without a model: which layers, which settings, which tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from isotune.adapters.settings import Settings
from isotune.checkpoint.base_record import BaseRecord
from isotune.errors import CheckpointError

MODEL = "base_model."  # before what a model's adapters share
PREFIX = "base_model.model."  # before the path of a module
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
        header = self.header or {}
        return BaseRecord(name, header.get("base_config", ""), task, header.get("labels", []))

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
                trained[p] = {**state, "weight": with_rows(state["weight"], indices, values)}
        kept = {p: weight for p, weight in self.base_weights.items() if p in self.settings}
        for path in self.base_weights.keys() - kept.keys():
            weight, state = self.base_weights[path], {} if base is None else base.state(path)
            if "weight" not in state or not is_equal(weight, state["weight"]):
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


def is_equal(stored: Tensor, own: Tensor) -> bool:
    """Whether a base has this weight, in the dtype that it is in there."""
    return stored.shape == own.shape and stored.to(own.dtype).equal(own.cpu())


def with_rows(weight: Tensor, indices: list[int], values: Tensor) -> Tensor:
    """A copy of the weight with other values in the rows of these indices."""
    return weight.index_copy(0, torch.tensor(indices, device=weight.device), values.to(weight))


def split_shared(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of the model as a whole, without their prefix, and those of its modules."""
    shared = {
        k.removeprefix(MODEL): t for k, t in tensors.items() if k.startswith(MODEL) and not k.startswith(PREFIX)
    }
    return shared, {k: t for k, t in tensors.items() if k.removeprefix(MODEL) not in shared}


def check_shared(path: Path, settings: Settings, shared: dict[str, Tensor]) -> None:
    if settings.stores_shared and not shared:
        raise CheckpointError(f"{path} is incomplete: what {settings.name} shares among all layers is missing")
    if shared and not settings.stores_shared:
        names = ", ".join(shared)
        raise CheckpointError(f"{path} holds {names}, which its {settings.name} adapter does not store")


def own_type(method: str) -> str:
    """The `peft_type` of an adapter that PEFT cannot load."""
    return f"ISOTUNE_{method.upper()}"
