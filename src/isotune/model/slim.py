"""Make of a model with channels left out (SPLoRA, SPPaRA) the plainly smaller model, its adapters in its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from isotune.adapters.sparse.structured import ChannelMasked
from isotune.bare import HOME, bare_class
from isotune.errors import IsotuneError
from isotune.matrix import Matrix
from isotune.model.adapted import Adapted
from isotune.model.fold import fold
from isotune.model.names import adapted_layers, base_modules
from isotune.sites import CONVOLUTIONS, require_site

_HEAD_SIZES = ("head_dim", "attention_head_size")
_HEADS = ("num_attention_heads", "num_heads", "n_heads", "num_key_value_heads", "all_head_size", "embed_dim")
"""What attention modules call the size of a head, and what counts heads or their features, of those that have it."""


class Slimmed(NamedTuple):
    """What `slim` did."""

    model: nn.Module
    """The model that it was given, without adapters and with smaller layers."""
    before: int
    """Numbers in the parameters of the base."""
    after: int
    """Those that are left."""
    channels: dict[str, tuple[int, int]]
    """By the first layer that makes them: how many outputs are left, and of how many."""


def slim(model: nn.Module) -> Slimmed:
    """Fold the active adapters into the weights, and take what they leave out off the layers, in place.

    Linear layers and convolutions get fewer channels, a batch norm between those that make channels and those that
    read them as well, and attention modules that say how many heads they have fewer of them. The output in evaluation
    mode stays as it was. The model's config says nothing of this: save the model with `torch.save`.

    Args:
        model: A model of which an active SPLoRA or SPPaRA leaves out channels.

    Returns:
        The model, and how much of it is left.

    Raises:
        IsotuneError: Nothing is left out, other adapters are active beside it, adapters are folded, or a layer or
            what stands around it cannot be made smaller. The model is then as it was.
    """
    parts = dict(_parts(model))
    modules = dict(base_modules(model))
    norms = _norms(parts, modules)
    attention = _attention(parts, modules)
    kept = {path: adapter.kept_out for path, adapter in parts.items() if adapter.kept_out is not None}
    made: dict[str, tuple[int, int]] = {}
    for path, mask in kept.items():
        made.setdefault(parts[path].settings.outputs, (int(mask.sum()), len(mask)))
    before = _numbers(model)
    fold(model, keep_base=False)
    for path, adapter in parts.items():
        _shrink(modules[path], adapter.kept_out if _read(adapter, parts) else None, adapter.kept_in)
    for path, mask in norms.items():
        _shrink_norm(modules[path], mask)
    for path, values in attention.items():
        for name, value in values.items():
            setattr(modules[path], name, value)
    return Slimmed(model, before, _numbers(model), made)


def _numbers(model: nn.Module) -> int:
    own = {id(p): p for name, p in model.named_parameters() if "isotune" not in name.split(".")}
    return sum(p.numel() for p in own.values())


def _parts(model: nn.Module) -> Iterator[tuple[str, ChannelMasked]]:
    """The adapters that leave channels out, by path. Raises IsotuneError where there are none, or more on a layer."""
    found = False
    for path, layer in adapted_layers(model):
        running = layer.isotune.running()
        masked = [a for a in running if isinstance(a, ChannelMasked) and a.leaves_out]
        if not masked:
            continue
        if len(running) > 1:
            raise IsotuneError(
                f"at {path!r} {len(running)} adapters are active, and one may fill what another leaves out; choose "
                "one, with isotune.use"
            )
        found = True
        _check_layer(path, layer)
        yield path, masked[0]
    if not found:
        raise IsotuneError(
            "no active adapter leaves out channels, so that there is nothing to make smaller; adapt with splora or "
            "sppara the layers that make channels and those that read them, keep < 1, and unfold what is folded"
        )


def _check_layer(path: str, layer: Adapted) -> None:
    site = require_site(layer, path)
    grouped = site.kind in CONVOLUTIONS and site.layer.groups > 1
    if isinstance(layer, Matrix) or site.packed or grouped:
        what = "a grouped convolution" if grouped else "packed" if site.packed else "a parameter of another module"
        raise IsotuneError(f"{path!r} is {what}, which cannot be made smaller; leave it out of the targets")


def _read(adapter: ChannelMasked, parts: Mapping[str, ChannelMasked]) -> bool:
    """Whether there are readers of what it makes, that go without it."""
    return any(a.kept_in is not None and a.settings.inputs == adapter.settings.outputs for a in parts.values())


def _norms(parts: Mapping[str, ChannelMasked], modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The batch norms between layers that make channels and those that read them, and what each of them keeps."""
    order = [path for path, module in modules.items() if module._modules.keys() <= {HOME}]
    found: dict[str, Tensor] = {}
    for path, adapter in parts.items():
        if adapter.kept_out is None or not _read(adapter, parts):
            continue
        name = adapter.settings.outputs
        last = max(order.index(p) for p, a in parts.items() if a.kept_out is not None and a.settings.outputs == name)
        first = min(order.index(p) for p, a in parts.items() if a.kept_in is not None and a.settings.inputs == name)
        for between in order[last + 1 : first]:
            module = modules[between]
            sizes = {size for p in module.parameters(recurse=False) for size in p.shape}
            if between in parts or len(adapter.kept_out) not in sizes | {getattr(module, "num_features", -1)}:
                continue
            if not isinstance(module, _BatchNorm):
                raise IsotuneError(
                    f"{between!r}, a {bare_class(module).__name__}, stands between {path!r} and what reads it, and "
                    "of such only batch norms can be made smaller; leave these layers out of the targets"
                )
            found[between] = adapter.kept_out
    return found


def _attention(parts: Mapping[str, ChannelMasked], modules: Mapping[str, nn.Module]) -> dict[str, dict[str, int]]:
    """New values for what attention modules say of their heads, by path and name."""
    found: dict[str, dict[str, int]] = {}
    for path, adapter in parts.items():
        if adapter.kept_out is None or not adapter.settings.heads:
            continue
        owner = path.rpartition(".")[0]
        size = next((s for name in _HEAD_SIZES if isinstance(s := getattr(modules[owner], name, None), int)), None)
        if size is None:
            raise IsotuneError(
                f"{owner!r}, a {bare_class(modules[owner]).__name__}, does not say how large its heads are "
                f"({' or '.join(_HEAD_SIZES)}), so that it may not run with fewer; adapt it without head_size"
            )
        full, left = len(adapter.kept_out), int(adapter.kept_out.sum())
        for name in _HEADS:
            value = getattr(modules[owner], name, None)
            if value in (full, full // size):
                found.setdefault(owner, {})[name] = left if value == full else left // size
    return found


def _shrink(layer: Any, rows: Tensor | None, columns: Tensor | None) -> None:
    """Leave a plain layer the rows (out) and the columns, or channels that it reads (in), that are true."""
    site = require_site(layer, "")
    transposed = site.kind == "gpt2_conv1d"
    W = layer.weight.detach()
    if rows is not None:
        W = W[:, rows] if transposed else W[rows]
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias.detach()[rows], requires_grad=False)
    if columns is not None:
        W = W[columns] if transposed else W[:, columns]
    layer.weight = nn.Parameter(W.contiguous(), requires_grad=False)
    n_out, n_in = (W.shape[1], W.shape[0]) if transposed else W.shape[:2]
    names = ("nf", "nx") if transposed else ("out_features", "in_features")
    if site.kind in CONVOLUTIONS:
        names = ("out_channels", "in_channels")
    for name, size in zip(names, (n_out, n_in), strict=True):
        if hasattr(layer, name):
            setattr(layer, name, size)


def _shrink_norm(norm: Any, kept: Tensor) -> None:
    for name, parameter in list(norm.named_parameters(recurse=False)):
        setattr(norm, name, nn.Parameter(parameter.detach()[kept], requires_grad=parameter.requires_grad))
    for name in ("running_mean", "running_var"):
        if getattr(norm, name) is not None:
            setattr(norm, name, getattr(norm, name)[kept])
    norm.num_features = int(kept.sum())
