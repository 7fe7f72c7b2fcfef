"""Absorb the active adapters into the base weights, and take them out again."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from isotune.errors import IsotuneError, IsotuneWarning
from isotune.matrix import Matrix
from isotune.model.adapted import (
    Adapted,
    Adapters,
    InPlace,
    Trained,
    adapted_site,
    adapted_weight,
    bare_modules,
    current,
)
from isotune.model.names import changed_modules, check_one_weight, unwrapped
from isotune.model.parametrized import home_of, take_off
from isotune.sites import require_site

_COMPUTE_WITH_THE_TIE = ("switch_transformers", "t5gemma", "udop", "umt5")
"""Models of transformers whose forward asks whether the head is tied."""


def fold(model: nn.Module, keep_base: bool = True) -> nn.Module:
    """Put the adapted weights in the place of the base's, so that the forward pass costs what the base costs.

    The modules trained in full take their places as well, in the dtype of the base. The state of the model is then
    that of a plain one under the base's names, with the adapters' own tensors beside it. Where a head and its
    embeddings are no longer one tensor, the config of the model says so from then on.

    With `keep_base` the base's tensors are kept, and `unfold` restores them bit for bit. Without it the adapters, and
    any inactive ones with them, are gone afterwards: the result is a plain model of the base's classes. Raises
    IsotuneError where nothing is active, the model is folded already, a weight is packed or computed, or rows of a
    batch use different adapters; nothing is folded then.
    """
    modules = list(changed_modules(model))
    if any(module.isotune.folded for _, module in modules):
        raise IsotuneError("the model's adapters are already folded; call unfold first")
    running = {path: module for path, module in modules if module.isotune.running()}
    if not running:
        raise IsotuneError("no adapter is active, so there is nothing to fold; choose some with isotune.use")
    check_one_weight(model, "fold")
    layers = {path: module for path, module in running.items() if isinstance(module, Adapted)}
    if packed := [path for path, layer in layers.items() if require_site(layer, path).packed]:
        raise IsotuneError(
            f"{', '.join(packed[:3])}{', ...' if packed[3:] else ''} cannot be folded: a quantised or packed weight "
            "cannot hold the adapted one exactly; run with the adapter beside it, or fold on the unquantised base"
        )
    for path, layer in layers.items():
        for adapter in layer.isotune.running():
            if not adapter.has_weight:
                raise IsotuneError(f"{path!r} cannot be folded: {adapter.no_weight}")
        if not isinstance(layer, Matrix) and layer._parameters.get("weight") is None:
            raise IsotuneError(f"{path!r} cannot be folded: its weight is no parameter, but computed from others")
    for module in running.values():
        _fold_copy(module) if isinstance(module, Trained) else _fold_layer(module)
        module.isotune.folded = True
    _untie(model, next(iter(running.values())).isotune)
    if not keep_base:
        for _, module in modules:
            module.isotune.kept.clear()
            take_off(module)
    return model


def unfold(model: nn.Module) -> nn.Module:
    """Undo `fold`: the base weights are restored bit for bit and the adapters run beside them again.

    Raises IsotuneError where nothing is folded.
    """
    folded = [module for _, module in changed_modules(model) if module.isotune.folded]
    if not folded:
        raise IsotuneError("nothing to unfold: no adapter is folded with keep_base=True")
    for module in folded:
        if isinstance(module, Matrix):
            home_of(module).restore()
        _restore(module.isotune)
        module.isotune.folded = False
    return model


def _untie(model: nn.Module, home: Adapters) -> None:
    """Say in the config of a transformers model that a head that differs from its embeddings is not tied to them."""
    own: Any = unwrapped(model)
    config: Any = getattr(own, "config", None)
    if not getattr(config, "tie_word_embeddings", False) or not hasattr(own, "get_output_embeddings"):
        return
    head, embeddings = own.get_output_embeddings(), own.get_input_embeddings()
    if head is None or head._parameters.get("weight") is embeddings._parameters.get("weight"):
        return
    if config.model_type in _COMPUTE_WITH_THE_TIE:
        warnings.warn(
            f"the head of this {config.model_type} and its embeddings are no longer one tensor, and its config "
            "cannot say so: with tie_word_embeddings=false it would compute something else. Saved and loaded again, "
            "the two may be tied anew",
            IsotuneWarning,
            stacklevel=3,
        )
        return
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for part in {id(config): config, id(text): text}.values():
        if getattr(part, "tie_word_embeddings", False):
            home.kept.append((part, "tie_word_embeddings", True))
            part.tie_word_embeddings = False


@torch.no_grad()
def _fold_layer(layer: InPlace) -> None:
    if isinstance(layer, Matrix):
        home_of(layer).write(adapted_site(layer).weight, layer)
        return
    old: Any = layer._parameters["weight"]
    W, bias = adapted_weight(layer), adapted_site(layer).bias
    _replace(layer.isotune, layer, "weight", _parameter(W, old.dtype))
    if bias is not layer._parameters.get("bias"):
        _replace(layer.isotune, layer, "bias", None if bias is None else _parameter(bias, old.dtype))


@torch.no_grad()
def _fold_copy(module: InPlace) -> None:
    own = dict(bare_modules(module))
    made: dict[int, Tensor] = {}  # what is tied within the module stays so
    for path, part in current(module).named_modules():
        for name, tensor in [*part._parameters.items(), *part._buffers.items()]:
            there = _tensors(own[path], name)
            if tensor is None or (old := there.get(name)) is None:
                continue
            if id(tensor) not in made:
                trained = name in part._parameters
                made[id(tensor)] = _parameter(tensor, old.dtype) if trained else tensor.to(old.dtype, copy=True)
            _replace(module.isotune, own[path], name, made[id(tensor)])


def _parameter(value: Tensor, dtype: torch.dtype) -> nn.Parameter:
    value = value.detach().to(dtype)
    return nn.Parameter(value.clone(memory_format=torch.contiguous_format), requires_grad=False)


def _tensors(module: nn.Module, name: str) -> dict[str, Any]:
    """Where the module holds the tensor of that name."""
    return module._buffers if name in module._buffers else module._parameters


def _replace(home: Adapters, module: nn.Module, name: str, value: Tensor | None) -> None:
    """Put a value in the place of a tensor, which is kept; one tied to it elsewhere in the model stays as it is."""
    there = _tensors(module, name)
    home.kept.append((module, name, there.get(name)))
    there[name] = value


def _restore(home: Adapters) -> None:
    for module, name, kept in home.kept:
        if not isinstance(module, nn.Module):
            setattr(module, name, kept)
            continue
        there = _tensors(module, name)
        if kept is not None and there[name] is not None and kept.device != there[name].device:
            kept.data = kept.data.to(there[name].device)
        there[name] = kept
    home.kept.clear()
