"""The adapted layers of a stored adapter, rebuilt one at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from isotune.adapters.contract import Adapter
from isotune.checkpoint.base import StoredBase, stored_layer
from isotune.checkpoint.load import fill
from isotune.checkpoint.stored import StoredAdapter
from isotune.errors import CheckpointError, IsotuneError, OptionError
from isotune.model.attach import build_adapters, draw_shared
from isotune.sites import Site, require_site

Part = tuple[str, Site, list[Adapter]]  # path, bare site, adapters in the order in which they are stacked


def stored_parts(stored: StoredAdapter, base: StoredBase | None) -> Iterator[Part]:
    """Walk the layers of `stored`; without a base their weights are undefined, but their shapes are right.

    Raises CheckpointError where a layer's shape is not that of the base, or is not known without one.
    """
    shared = stored.shared or _drawn(stored, base)
    for p, settings in stored.settings.items():
        weight = _weight(stored, base, p)
        bias = None if base is None else base.bias(p)
        layer = stored_layer(_kind(stored, p, weight.dim()), weight, bias)
        try:
            (adapter,) = build_adapters({p: layer}, {p: settings}, shared=shared).values()
        except IsotuneError as error:
            raise CheckpointError(f"{stored.path} does not fit the base: {error}") from None
        fill(adapter, stored, p, layer)
        yield p, require_site(layer, p), [adapter]


def _weight(stored: StoredAdapter, base: StoredBase | None, p: str) -> torch.Tensor:
    if base is None:
        return torch.empty(_shape(stored, base, p))
    return base.weight(p, stored.header["sites"][p].get("matrix") if stored.header else None)


def _drawn(stored: StoredAdapter, base: StoredBase | None) -> dict[str, torch.Tensor]:
    """What the adapters share, drawn again for all the layers together: it depends on the largest of them."""
    try:
        return draw_shared(stored.settings, (_hollow(stored, base, p) for p in stored.settings))
    except OptionError as error:
        raise CheckpointError(f"{stored.path} cannot be used: {error}") from None


def _hollow(stored: StoredAdapter, base: StoredBase | None, p: str) -> Site:
    """The site at p, of which only the shape is known."""
    shape = _shape(stored, base, p)
    return require_site(stored_layer(_kind(stored, p, len(shape)), torch.empty(shape, device="meta")), p)


def _shape(stored: StoredAdapter, base: StoredBase | None, p: str) -> list[int]:
    if stored.header is not None:
        return list(stored.header["sites"][p]["shape"])
    if base is None:
        raise CheckpointError(f"{stored.path} does not say how large its layers are; name the base model (--base)")
    return base.shape(p)


def _kind(stored: StoredAdapter, p: str, dimensions: int) -> str:
    if stored.header is not None:
        return str(stored.header["sites"][p]["kind"])
    if dimensions == 4:
        return "conv2d"
    if "lora_embedding_A" in stored.state[p]:
        return "embedding"
    return "conv1d" if stored.config.get("fan_in_fan_out") else "linear"
