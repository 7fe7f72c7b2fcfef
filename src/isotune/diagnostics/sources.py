"""What can be diagnosed: an adapter, a run of either kind, or a fine-tuned model; its matrices one at a time."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import defaultdict
from pathlib import Path
from typing import Literal

import torch

from isotune.checkpoint.base import StoredBase, local_folder
from isotune.checkpoint.files import CONFIG
from isotune.checkpoint.parts import StoredParts
from isotune.checkpoint.read import holds_adapter, read_stored
from isotune.checkpoint.stored_models import read_model
from isotune.checkpoint.tensor_kinds import is_vocabulary, tensor_kinds
from isotune.diagnostics.weights import Weight, exact_change, require_finite
from isotune.errors import CheckpointError
from isotune.folders import ADAPTER, MODEL, MODEL_CONFIG, RECIPE, TASK
from isotune.linalg.precision import at_least_fp32
from isotune.matrix import as_matrix

Kind = Literal["adapter", "checkpoint"]


class Source(ABC):
    """An adaptation whose matrices are read when they are asked for."""

    kind: Kind
    path: Path
    """The folder that holds the weights; for a run, the one in it."""
    method: str
    base_model: str | None
    """The name of the base, where it is known."""
    base: StoredBase | None
    """The base, where it is at hand."""
    names: dict[str, str]
    """By the name of the base's tensor (the path, without a base) the path of each matrix."""
    trained_modules: list[str]
    """Modules that an adapter trained in full."""
    left_out: dict[str, list[str]]
    """Tensors that are not measured, by the reason."""

    @abstractmethod
    def at(self, path: str) -> Weight:
        """The matrix there. Raises CheckpointError where it cannot be read."""


def find_source(path: str | Path) -> tuple[Kind, Path]:
    """What is at `path`, or in the run there, and the folder that holds it. Raises CheckpointError for neither."""
    path = Path(path)
    for folder in (path, path / ADAPTER):
        if holds_adapter(folder):
            return "adapter", folder
    for folder in (path, path / MODEL):
        if (folder / MODEL_CONFIG).is_file():
            return "checkpoint", folder
    if not path.is_dir():
        found = local_folder(path)
        if found is not None:
            return "checkpoint", found
        raise CheckpointError(f"there is no adapter folder {path}, nor a run's or a model's")
    if (path / RECIPE).is_file():
        raise CheckpointError(f"the run in {path} is not finished: isotune train {path / RECIPE} --resume")
    raise CheckpointError(
        f"{path} is no adapter, no run and no model: it holds no {CONFIG}, no {RECIPE} and no {MODEL_CONFIG}"
    )


def open_source(path: str | Path, base: str | Path | None = None) -> Source:
    """The adaptation at `path`. Raises CheckpointError where it, or the base, cannot be used.

    Without `base` (a folder or a hub id) it is the folder, or packaged model, that the adaptation itself names.
    """
    kind, folder = find_source(path)
    return AdapterSource(folder, base) if kind == "adapter" else CheckpointSource(folder, base)


class AdapterSource(Source):
    """A stored adapter, isotune's or PEFT's."""

    kind = "adapter"

    def __init__(self, path: Path, base: str | Path | None) -> None:
        self.path, self.stored = path, read_stored(path)
        self.method = self.stored.method
        self.base_model = self.stored.base.name
        self.base = _base(base, self.base_model)
        self.parts = StoredParts(self.stored, self.base)
        self.trained_modules, self.left_out = self.stored.in_full, {}
        self.names = {}
        for p in self.stored.settings:
            name = self._name(p)
            self.names[p if name in self.names else name] = p

    def at(self, path: str) -> Weight:
        site, (adapter,) = self.parts.at(path)
        with torch.no_grad():
            change = exact_change(adapter, site, self.base is not None)
        found = Weight(
            path,
            site.kind,
            adapter.method,
            (site.out_features, site.in_features),
            sum(parameter.numel() for parameter in adapter.parameters()),
            None if self.base is None else at_least_fp32(site.weight),
            change,
            adapter,
            site,
        )
        return require_finite(found, self.path)

    def _name(self, path: str) -> str:
        if self.base is None:
            return path
        header = self.stored.header
        matrix = header["sites"][path].get("matrix") if header else None
        name = self.base.name_of(path, matrix)
        return name if matrix is None else f"{name}[{matrix['index']}]"


class CheckpointSource(Source):
    """A model that was trained in full, beside the one that it started from: the matrices of its layers.

    Embeddings, output heads over the vocabulary and tensors that are no matrix of a layer are left out, as are
    matrices that the base lacks or has in another shape.
    """

    kind = "checkpoint"
    method = "full"

    def __init__(self, path: Path, base: str | Path | None) -> None:
        self.path = path
        self.stored = read_model(path, "the model")
        self.base_model = str(base) if base is not None else _recorded(path, self.stored.config)
        found = _base(base, self.base_model)
        if found is None:
            named = f", and the one it names, {self.base_model}, is not at hand" if self.base_model else ""
            raise CheckpointError(
                f"{path} is a full model, which can only be measured against the one that it started from{named}; "
                "name that with base=... (--base)"
            )
        self.base = found
        self.origin = read_model(found.folder, "the base")
        self.trained_modules = []
        shapes = {name: header.shape for name, header in self.stored.headers.items() if header.floating}
        self.kinds = tensor_kinds(path, self.stored.config, shapes)
        self.vocabulary = int(self.stored.config.get("vocab_size") or -1)
        left_out = defaultdict(list)
        self.names, self._names = {}, {}
        for name in shapes:
            own, why = self._matched(name)
            if why:
                left_out[why].append(name)
            else:
                self.names[own] = self.kinds.path(name)
                self._names[self.kinds.path(name)] = (name, own)
        self.left_out = dict(left_out)
        if not self.names:
            raise CheckpointError(
                f"{path} has no matrix in common with the base in {found.folder}; name the model that it started "
                "from with base=... (--base)"
            )

    def at(self, path: str) -> Weight:
        name, own = self._names[path]
        turned = name in self.kinds.transposed
        after = at_least_fp32(as_matrix(self.stored.tensor(name), None, turned))
        W = at_least_fp32(as_matrix(self.origin.tensor(own), None, turned))
        dimensions = len(self.stored.headers[name].shape) - 2
        kind = f"conv{dimensions}d" if dimensions else "gpt2_conv1d" if turned else "linear"
        rows, columns = W.shape
        return Weight(path, kind, self.method, (rows, columns), W.numel(), W, after.to(W.dtype) - W)

    def _matched(self, name: str) -> tuple[str, str | None]:
        """The base's tensor for a matrix of the model, or why it is left out."""
        shape = self.stored.headers[name].shape
        if len(shape) < 2:
            return "", "vectors"
        if name not in self.kinds.matrices:
            return "", "embeddings and other tensors that are no matrix of a layer"
        if is_vocabulary(name, shape, self.vocabulary):
            return "", "output heads over the vocabulary"
        if len(shape) == 3:
            return "", "stacks of matrices and one-dimensional convolutions"
        assert self.base is not None
        try:
            own = self.base.name_of(name.removesuffix(".weight")) if name.endswith(".weight") else name
        except CheckpointError:
            own = ""
        if own not in self.origin.headers:
            return "", "not in the base"
        if self.origin.headers[own].shape != shape or not self.origin.headers[own].floating:
            return "", "of another shape in the base"
        return own, None


def _base(asked: str | Path | None, recorded: str | None) -> StoredBase | None:
    """The base that was asked for, or the one recorded where it is at hand."""
    if asked is not None:
        return StoredBase(asked)
    if not recorded or (folder := local_folder(recorded)) is None:
        return None
    try:
        return StoredBase(folder)
    except CheckpointError:
        return None


def _recorded(path: Path, config: dict[str, object]) -> str | None:
    """What a model folder says it started from: its run's task.json, or config.json."""
    try:
        found = json.loads((path / TASK).read_text(encoding="utf-8")).get("model")
    except (OSError, ValueError, AttributeError):
        found = None
    return str(found or config.get("_name_or_path") or "") or None
