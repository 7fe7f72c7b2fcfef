"""The one way through a model: its modules with their paths in the base, whatever is around and on them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from isotune.errors import IsotuneError
from isotune.model.adapted import Adapted, Adapters, InPlace, Trained

_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
}
"""torch's modules that stand around another and lend it a name, with that name."""
VIEW = "base_model_of_isotune"
"""The attribute by which a view of ours on a model is known; it names where in the view the model is."""


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside of what `torch.compile`, DDP, FSDP, activation checkpointing and `as_peft` put around it."""
    if (inside := getattr(type(module), VIEW, None)) is not None:
        return unwrapped(module._modules[inside])  # type: ignore[arg-type]
    for kind in type(module).__mro__:
        if kind.__name__ in _WRAPPERS and kind.__module__.startswith("torch."):
            inner = module._modules[_WRAPPERS[kind.__name__]]
            assert inner is not None
            return unwrapped(inner)
    return module


def base_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Walk the model as if nothing were on it or around its parts; modules trained in full are not opened.

    The adapted matrices of a parameter appear as if they were children of its module.
    """
    model = unwrapped(model)
    yield prefix, model
    if isinstance(model, Trained):
        return
    for name, child in model.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if name == "parametrizations":
            for key, chain in child.named_children():
                matrices = getattr(next(chain.children(), None), "matrices", None)
                if matrices is None:
                    yield from base_modules(chain, f"{path}.{key}")
                for index, matrix in (matrices or {}).items():
                    own = f"{prefix}.{key}" if prefix else key
                    yield f"{own}.{index}" if index.isdigit() else own, matrix
        elif not isinstance(child, Adapters):
            yield from base_modules(child, path)


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """The adapted layers of a model with their paths in the base model."""
    return ((path, module) for path, module in base_modules(model) if isinstance(module, Adapted))


def trained_modules(model: nn.Module) -> Iterator[tuple[str, Trained]]:
    """The modules that adapters train in full, with their paths in the base model."""
    return ((path, module) for path, module in base_modules(model) if isinstance(module, Trained))


def changed_modules(model: nn.Module) -> Iterator[tuple[str, InPlace]]:
    """Both of them."""
    return ((path, module) for path, module in base_modules(model) if isinstance(module, InPlace))


def check_one_weight(model: nn.Module, what: str) -> None:
    """Raise IsotuneError where the rows of a batch use different adapters, so that there is not one weight."""
    if any(layer.isotune.routing is not None for _, layer in adapted_layers(model)):
        raise IsotuneError(
            f"there is not one weight to {what}: the rows of a batch use different adapters; "
            "choose one first, with isotune.use(model, name)"
        )
