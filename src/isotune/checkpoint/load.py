"""Put a stored adapter on a model: strictly, and all or nothing."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from isotune.adapters.contract import Adapter, check_tensors
from isotune.adapters.shared import Shared
from isotune.checkpoint.base_record import base_config, differences, former_digest
from isotune.checkpoint.experts import on_joined_experts
from isotune.checkpoint.read import read_stored
from isotune.checkpoint.stored import StoredAdapter, is_equal
from isotune.errors import CheckpointError, IsotuneError, IsotuneWarning
from isotune.model.adapted import bare_state
from isotune.model.attach import attach, build_adapters, check_in_memory, site_for
from isotune.model.names import base_modules, changed_modules, unwrapped
from isotune.model.parametrized import with_matrices
from isotune.model.switch import use
from isotune.sites import require_site

_RESIZE = "where tokens were added, add them to the model as well: model.resize_token_embeddings({})"


def load(
    model: nn.Module, path: str | Path, name: str = "default", trainable: bool = False, force: bool = False
) -> nn.Module:
    """Put the adapter saved at `path` on the model, in place, and use it alone.

    Args:
        model: The base model that the adapter was made for (it may have other adapters).
        path: An adapter folder of isotune or PEFT, or a file of diffusers that holds a LoRA for this model.
        name: The adapter's name on this model.
        trainable: Whether it goes on training.
        force: Load onto a base whose configuration differs from the one that the adapter was made for.

    Returns:
        The same model.

    Raises:
        CheckpointError: The folder is damaged, holds too much or too little, or is for another base. The model is
            then as it was.
        OptionError: The model has an adapter of that name already.
        TargetError: A layer of the adapter is offloaded, or on the meta device.
    """
    own = dict(base_modules(model))
    stored = read_stored(path, known=own)
    stored = on_joined_experts(stored, model, own)
    modules = with_matrices(own, stored.settings)
    _check_base(model, modules, stored, force)
    stored = stored.completed(_Modules(modules))
    try:
        layers = {p: module for p, module in modules.items() if p in stored.settings}  # in the model's order
        shared = dict.fromkeys(layers, stored.shared) if stored.shared else None
        adapters = build_adapters(layers, stored.settings, shared=shared)
    except IsotuneError as error:
        raise CheckpointError(f"{path} does not fit this model: {error}") from None
    _fill_all(adapters, stored, layers)
    for p, found in stored.trained.items():
        _check_module(modules[p], found, p, stored)
    attach(model, adapters, stored.settings, {p: modules[p] for p in stored.trained}, name)
    for p, found in stored.trained.items():
        _home(modules[p])[name].load_state_dict(found)
    _name_labels(model, stored.base.labels)
    return use(model, name, train=trainable)


def _name_labels(model: nn.Module, labels: list[str]) -> None:
    """Give a classifier the names of the labels that it was trained for, where it has none but numbers."""
    config: Any = getattr(unwrapped(model), "config", None)
    if labels and getattr(config, "id2label", None) == {n: f"LABEL_{n}" for n in range(len(labels))}:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: number for number, label in enumerate(labels)}


class _Modules:
    """The base's modules as where a stored adapter gets what it does not hold."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        self.modules = modules

    def state(self, path: str) -> dict[str, Tensor]:
        return bare_state(self.modules[path])

    def tied(self, path: str) -> list[str]:
        weight = self.modules[path]._parameters["weight"]
        return [p for p, module in self.modules.items() if p != path and module._parameters.get("weight") is weight]


def load_weights(model: nn.Module, path: str | Path, name: str = "default") -> None:
    """Take the values saved at `path` over into the adapter `name`, which the model already has, bit for bit.

    Raises CheckpointError where the two differ in anything but values.
    """
    stored = read_stored(path)
    modules = {p: m for p, m in changed_modules(model) if name in m.isotune}
    homes = {p: m.isotune for p, m in modules.items()}
    settings = {p: home.settings[name] for p, home in homes.items() if name in home.settings}
    if settings != stored.settings or homes.keys() != settings.keys() | stored.trained.keys():
        raise CheckpointError(f"{path} was not saved from the adapter {name!r} as it is on this model")
    for p, found in stored.trained.items():
        _check_module(modules[p], found, p, stored)
    if stored.shared:
        _fill_shared({cast(Adapter, homes[p][name]).shared for p in settings}, stored)
    _fill_all({p: cast(Adapter, homes[p][name]) for p in stored.settings}, stored, modules)
    for p, found in stored.trained.items():
        homes[p][name].load_state_dict(found)


def fill(adapter: Adapter, stored: StoredAdapter, p: str, layer: nn.Module) -> None:
    """Give an adapter built for the layer at `p` its stored tensors. Raises CheckpointError where they do not fit."""
    try:
        adapter.load_peft_state(stored.state[p], site_for(layer, p, stored.settings[p]))
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{stored.path}, at {p!r}: {error.args[0]}") from None


def _fill_all(adapters: Mapping[str, Adapter], stored: StoredAdapter, layers: Mapping[str, nn.Module]) -> None:
    """Give all adapters their tensors. Raises CheckpointError where layers that share one hold different values."""
    for p, adapter in adapters.items():
        fill(adapter, stored, p, layers[p])
    for p, adapter in adapters.items():
        own = stored.settings[p]
        if not own.trains_shared or own.stores_shared:
            continue
        for name, tensor in adapter.peft_state(site_for(layers[p], p, own)).items():
            if not is_equal(stored.state[p][name], tensor):
                raise CheckpointError(f"{stored.path}, at {p!r}: {name} differs from that of a layer that shares it")


def _fill_shared(copies: set[Shared], stored: StoredAdapter) -> None:
    """Give what adapters share, a copy for each device, the stored values."""
    for shared in copies:
        own = shared.tensors()
        try:
            check_tensors(stored.shared, {name: tuple(tensor.shape) for name, tensor in own.items()})
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{stored.path}: {error.args[0]}") from None
        for name, tensor in own.items():
            tensor.detach().copy_(stored.shared[name])


def _home(module: Any) -> Any:
    return module.isotune


def _check_base(model: nn.Module, modules: dict[str, nn.Module], stored: StoredAdapter, force: bool) -> None:
    other = f"{stored.path} was made for another base"
    paths = *stored.settings, *stored.trained, *stored.base_weights, *stored.rows
    for p in paths:
        if p not in modules:
            raise CheckpointError(f"{other}: this model has no layer {p!r}")
    check_in_memory({p: modules[p] for p in paths})
    for p in stored.base_weights.keys() & stored.settings.keys():
        weight: Any = require_site(modules[p], p).parameter
        if not is_equal(stored.base_weights[p], weight.detach()):
            raise CheckpointError(
                f"{other}: it comes with its own weight for {p!r}, which differs from this model's. Where tokens "
                "were added, give the model that weight first: base weights are never changed by an adapter"
            )
    for p, (indices, _) in stored.rows.items():
        last, here = max(indices), len(bare_state(modules[p])["weight"])
        if last >= here:
            raise CheckpointError(
                f"{stored.path} holds row {last} of {p!r}, which has {here} rows here; {_RESIZE.format(last + 1)}"
            )
    if stored.header is None:
        return
    for p, entry in stored.header["sites"].items():
        site = site_for(modules[p], p, stored.settings[p])
        if list(site.shape) != entry["shape"]:
            raise CheckpointError(
                f"{other}: the weight of {p!r} was {entry['shape']} there and is {list(site.shape)} here"
            )
    recorded = stored.header["base_config"]
    if isinstance(recorded, str):
        if recorded and former_digest(model) not in ("", recorded):
            warnings.warn(
                f"{stored.path} was made by an isotune before 0.2 for a base with another configuration. "
                "It does not say in what; a field that decides nothing is enough.",
                IsotuneWarning,
                stacklevel=3,
            )
    elif (different := differences(base_config(model), recorded)) and not force:
        fields = "; ".join(f"{key}: {here!r} here, {saved!r} saved" for key, (here, saved) in different.items())
        raise CheckpointError(f"{other}, {fields}. If you know that the two fit, load it with force=True (--force)")


def _check_module(module: nn.Module, found: dict[str, Tensor], p: str, stored: StoredAdapter) -> None:
    own = bare_state(module)
    try:
        check_tensors(found, {key: tuple(t.shape) for key, t in own.items()})
    except (KeyError, ValueError) as error:
        pairs = ((found[key].shape, own[key].shape) for key in found.keys() & own.keys() if found[key].ndim == 2)
        there, here = next(((one, two) for one, two in pairs if one != two), ((0,), (0,)))
        hint = ""
        if there[0] == len(stored.base.labels) != here[0]:
            hint = f"; open the base with its {there[0]} labels: from_pretrained(..., num_labels={there[0]})"
        elif there[0] > here[0] and there[1:] == here[1:]:
            hint = f"; {_RESIZE.format(there[0])}"
        raise CheckpointError(f"{stored.path}, at {p!r} (trained in full): {error.args[0]}{hint}") from None
