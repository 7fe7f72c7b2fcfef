"""What trains, in groups for an optimizer: each parameter at its rate, by the algorithm that suits what it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from isotune.adapters.contract import Adapter, Part, Treatment
from isotune.errors import IsotuneError
from isotune.model.adapted import current
from isotune.model.names import adapted_layers, base_modules, trained_modules, unwrapped
from isotune.model.rates import treatments
from isotune.optim.batched import ADAMW
from isotune.optim.names import optimizer_class

_TAKE_ANY = ("adarem", "scion", "scion_light")
"""Algorithms that have a step of their own for whatever is no matrix."""
_LAYOUTS: dict[Part, str] = {"skew": "skew", "matrices": "matrices"}
_MATRICES = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention)


def parameter_groups(
    model: nn.Module, lr: float, weight_decay: float = 0.0, algorithm: str | None = None
) -> list[dict[str, Any]]:
    """What trains, in groups for an optimizer such as `torch.optim.AdamW`, or with an algorithm for one of ours.

    With an algorithm, it steps what the adapters say are matrices (B and A, directions, skew-symmetric ones) and the
    weights of linear layers and convolutions that train themselves; magnitudes, scales, norms, biases, embeddings
    and heads, tied ones too, are left to AdamW in the same optimizer. Of a model of transformers whatever is outside
    of the backbone is a head; of others nothing is known, but what `train_also` names.

    Args:
        model: A model with adapters in use, or one that trains itself.
        lr: The learning rate; methods put factors on it for some of their parameters (LoRA+ for B).
        weight_decay: The weight decay, likewise.
        algorithm: One of `isotune.optim.OPTIMIZERS`, for the optimizer of that name.

    Raises:
        IsotuneError: `odelora`, where nothing has a pair of factors that it could step.
        OptionError: An algorithm of another name.
    """
    if algorithm is not None:
        optimizer_class(algorithm)
    own, roles = treatments(model), _roles(model, algorithm) if algorithm else {}
    found: dict[Any, dict[str, Any]] = {}
    for parameter in _in_order(model, roles):
        how = own.get(parameter, Treatment())
        role = roles.get(parameter, {"algorithm": ADAMW}) if algorithm else {}
        group = found.setdefault(
            (how, tuple(sorted(role.items()))),
            {"params": [], "lr": lr * how.rate, "weight_decay": weight_decay * how.decay, **role},
        )
        group["params"].append(parameter)
    if algorithm == "odelora" and not any(group["algorithm"] == algorithm for group in found.values()):
        raise IsotuneError("odelora steps the two factors of a LoRA, or of its kin, and nothing here has such a pair")
    return list(found.values())


def _in_order(model: nn.Module, roles: dict[nn.Parameter, dict[str, Any]]) -> Iterator[nn.Parameter]:
    """What trains, as the model has it, but for what has a role, which comes first: A before its B."""
    yield from roles
    yield from (p for p in model.parameters() if p.requires_grad and p not in roles)


def _roles(model: nn.Module, algorithm: str) -> dict[nn.Parameter, dict[str, Any]]:
    """For what the algorithm steps, the entries of its group."""
    roles: dict[nn.Parameter, dict[str, Any]] = {}
    for adapter in _adapters(model):
        parts = {name: part for name, part in adapter.parts.items() if name in dict(adapter.named_parameters())}
        if algorithm == "odelora":
            if adapter.product_scale is not None and parts.keys() >= {"A", "B"}:
                pair = {"algorithm": algorithm, "scale": adapter.product_scale}
                roles |= {adapter.get_parameter(name): pair for name in ("A", "B")}
            continue
        for name, part in parts.items():
            if algorithm != "allora" or part == "B":
                layout = _LAYOUTS.get(part, "matrix")
                roles[adapter.get_parameter(name)] = {"algorithm": algorithm, "part": layout}
    if algorithm not in ("odelora", "allora"):
        roles |= {p: {"algorithm": algorithm} for p in _hidden(model) if p not in roles}
    if algorithm in _TAKE_ANY:
        heads = set(_heads_and_embeddings(model)) if algorithm != "adarem" else set()
        for p in model.parameters():
            norm = {"norm": "sign"} if p in heads and p.dim() > 1 else {}
            roles.setdefault(p, {"algorithm": algorithm, **norm})
    return {p: role for p, role in roles.items() if p.requires_grad}


def _adapters(model: nn.Module) -> Iterator[Adapter]:
    """Those in use, and the adapters that they are made of."""
    for _, layer in adapted_layers(model):
        for adapter in layer.isotune.running():
            yield from (part for part in adapter.modules() if isinstance(part, Adapter))


def _hidden(model: nn.Module) -> Iterator[nn.Parameter]:
    """Weights of linear layers and convolutions that train, but for heads, and what is tied to an embedding."""
    outside = set(_heads_and_embeddings(model))
    for _, module in base_modules(model):
        if isinstance(module, _MATRICES) or type(module).__name__ == "Conv1D":
            yield from (p for p in module.parameters(False) if p.requires_grad and p.dim() > 1 and p not in outside)


def _heads_and_embeddings(model: nn.Module) -> Iterator[nn.Parameter]:
    model = unwrapped(model)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            yield from module.parameters(False)
    for _, trained in trained_modules(model):
        yield from current(trained).parameters()
    backbone = getattr(model, "base_model", None)
    if isinstance(backbone, nn.Module) and backbone is not model:
        inside = {*backbone.parameters()}
        yield from (p for p in model.parameters() if p not in inside)
