"""Adapters in folders, compressed into one folder from which each comes back as a LoRA, by its name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad

from isotune.adapters.low_rank.lora import LoRA
from isotune.checkpoint.base import StoredBase
from isotune.checkpoint.base_record import BaseRecord
from isotune.checkpoint.files import check_writable, replaced_folder
from isotune.checkpoint.paired_files import Shapes, read_sealed, write_sealed
from isotune.checkpoint.save import write_parts
from isotune.checkpoint.stored import StoredAdapter
from isotune.errors import CheckpointError, NoLowRankFormError
from isotune.folders import TASK
from isotune.linalg.low_rank import Factored
from isotune.merging.adapters.checks import read_models
from isotune.merging.adapters.inputs import Model
from isotune.merging.names import model_names
from isotune.merging.record import CompressedAdapters
from isotune.merging.reversible.compress import Granularity, compress
from isotune.merging.reversible.stored import INDEX, Reversible
from isotune.sites import current_entry, require_site, stored_layer

NAME = "adapters"


def compress_adapters(
    adapters: Sequence[str | Path],
    output: str | Path,
    names: Sequence[str] | None = None,
    basis: int | None = None,
    tolerance: float | None = None,
    granularity: Granularity = "position",
    center: bool = False,
    align: bool = True,
    base: str | Path | None = None,
    progress: bool = True,
) -> CompressedAdapters:
    """Compress the adapters in several folders, isotune's or PEFT's, into the folder `output`.

    Modules trained in full, such as classifier heads, are kept as they are, and so is what `isotune evaluate` needs
    to know of the task. The options are those of
    `isotune.merging.reversible.compress.compress`.

    Args:
        adapters: The folders. The adapters may differ in method, rank and layers.
        output: The folder to write: absent, empty, or one that holds older compressed adapters.
        names: Names of the adapters; by default those of their folders.
        basis: The number of basis models for each layer; by default 2, where no tolerance is given.
        tolerance: In its place, the largest relative error of a layer's change.
        granularity: "position" or "layer".
        center: Take the mean adapter as one of the basis models.
        align: Bring the factors into one gauge first.
        base: The base model's folder or hub id, for methods whose change depends on its weights.
        progress: Whether to show a progress bar, on standard error where that is a terminal.

    Returns:
        What was written; `Reversible.load(output)` has the errors of every layer.

    Raises:
        OptionError: Options or names that cannot be used.
        NoLowRankFormError: An adapter whose change has no exact low-rank form.
        CheckpointError: Adapters that cannot be read, need the base, change a bias, or do not fit together.
    """
    names = model_names(adapters, names)
    check_writable(output, INDEX)
    weights = None if base is None else StoredBase(base)
    stored = read_models(adapters, names, [1.0] * len(names), weights)
    stored = [replace(model, stored=model.stored.completed(weights)) for model in stored]
    sites: dict[str, dict[str, dict[str, Any]]] = {}
    for model in stored:
        for path, entry in _entries(model, weights):
            sites.setdefault(path, {})[model.name] = entry
    _check_sites(sites)
    models = {model.name: _Changes(model) for model in stored}
    found = compress(models, basis, tolerance, granularity, center, align, progress)
    index = {
        "adapters": {model.name: _entry(model.stored) for model in stored},
        "sites": {path: next(iter(entries.values())) for path, entries in sites.items()},
    }
    trained = {
        f"{number}.{path}.{key}": tensor
        for number, model in enumerate(stored)
        for path, state in model.stored.trained.items()
        for key, tensor in state.items()
    }
    worst = {
        key: {name: max(getattr(error, key) for error in sites.values()) for name, sites in found.errors.items()}
        for key in ("change", "predicted")
    }
    record = CompressedAdapters(
        path=Path(output),
        rule="rmm",
        models=dict.fromkeys(names, 1.0),
        folders=[str(folder) for folder in adapters],
        options={
            "basis": basis,
            "tolerance": tolerance,
            "granularity": granularity,
            "center": center,
            "align": align,
        },
        base=None if base is None else str(base),
        errors=worst["change"],
        predicted=worst["predicted"],
        values=found.values,
        separate_values=found.separate_values,
    )
    with replaced_folder(output, INDEX) as folder:
        found.write(folder)
        write_sealed(folder, NAME, index, trained)
        record.write(folder)
    return record


def recover_adapter(folder: str | Path, name: str, output: str | Path) -> Path:
    """Write one of the adapters in a folder of `compress_adapters` as a LoRA in PEFT's layout.

    One rank for all layers (zero-padded) and `lora_alpha = r`; modules trained in full come back bit for bit.

    Args:
        folder: The folder with the compressed adapters.
        name: The adapter's name there.
        output: The folder to write: absent, empty, or an adapter's.

    Returns:
        The folder written.

    Raises:
        OptionError: There is no adapter of that name; the message lists those that there are.
        CheckpointError: The folder is damaged, or the output cannot be written.
    """
    folder = Path(folder)
    found = Reversible.load(folder)
    changes = found.recover(name)
    index, tensors = read_sealed(folder, NAME, _shapes)
    sites, adapters = index["sites"], index["adapters"]
    if list(adapters) != list(found.names) or not found.sites.keys() <= sites.keys():
        raise CheckpointError(f"the files in {folder} do not belong together; restore them from their source")
    check_writable(output)
    settings = LoRA(rank=max((change.rank for change in changes.values()), default=0) or 1)
    parts: dict[str, Any] = {}
    for path, (B, A) in changes.items():
        entry = current_entry(sites[path])
        site = require_site(stored_layer(entry["kind"], torch.empty(entry["shape"], device="meta")), path)
        more = settings.rank - len(A)
        parts[path] = (site, settings, settings.adapter(pad(A, (0, 0, 0, more)), pad(B, (0, more)), site))
    number = found.names.index(name)
    trained = {
        path: {key: tensors[f"{number}.{path}.{key}"] for key in shapes}
        for path, shapes in adapters[name]["trained"].items()
    }
    of = adapters[name]
    entries = {path: current_entry(sites[path]) for path in parts}
    base = BaseRecord(of["base_model"], of["base_config"], of.get("task_type"), of.get("labels", []))
    return write_parts(output, parts, trained, base, entries, files={TASK: of["task"]})


def _entries(model: Model, base: StoredBase | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The path of each layer, and what the header says of the site."""
    entries = (model.stored.header or {"sites": {}})["sites"]
    for path in model.paths:
        if base is None and model.needs_base(path):
            raise CheckpointError(
                f"{model.stored.path}: the change that {model.stored.method} makes depends on the base's weights; "
                "name the base model with base=... (--base)"
            )
        entry = entries.get(path, {"kind": model.parts.kind(path), "shape": model.parts.shape(path)})
        yield path, {key: value for key, value in entry.items() if key != "settings"}


@dataclass(frozen=True, eq=False)
class _Changes(Mapping[str, Factored]):
    """The changes B A of one model by layer, read as they are asked for."""

    model: Model

    def __getitem__(self, path: str) -> Factored:
        change = self.model.change(path)
        if not isinstance(change, Factored):
            stored = self.model.stored
            raise NoLowRankFormError(
                f"{stored.path}, at {path!r}: {stored.method} has no exact low-rank form, so that it "
                "cannot be compressed; leave this adapter out"
            )
        return change

    def __iter__(self) -> Iterator[str]:
        return iter(self.model.paths)

    def __len__(self) -> int:
        return len(self.model.paths)

    def __contains__(self, path: object) -> bool:
        return path in self.model.stored.settings


def _check_sites(sites: dict[str, dict[str, dict[str, Any]]]) -> None:
    """Raise CheckpointError where a layer is not the same in all adapters that have it."""
    problems = []
    for path, entries in sites.items():
        said = {name: f"{' x '.join(map(str, e['shape']))} ({e['kind']})" for name, e in entries.items()}
        if len(set(said.values())) > 1:
            problems.append(f"{path!r} is " + ", ".join(f"{what} in {name}" for name, what in said.items()))
    if problems:
        raise CheckpointError(f"these adapters do not fit together: {'; '.join(problems)}")


def _entry(stored: StoredAdapter) -> dict[str, Any]:
    task = stored.path / TASK
    return {
        "task": task.read_text() if task.is_file() else None,
        "base_model": stored.base.name,
        "base_config": stored.base.config,
        "task_type": stored.base.task_type,
        "labels": stored.base.labels,
        "trained": {path: {key: list(t.shape) for key, t in state.items()} for path, state in stored.trained.items()},
    }


def _shapes(index: dict[str, Any]) -> Shapes:
    return {
        f"{number}.{path}.{key}": tuple(shape)
        for number, entry in enumerate(index["adapters"].values())
        for path, shapes in entry["trained"].items()
        for key, shape in shapes.items()
    }
