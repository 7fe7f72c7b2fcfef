"""The adapted layers of a stored adapter, rebuilt one at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from isotune.adapters.contract import Adapter
from isotune.checkpoint.base import StoredBase, stored_layer
from isotune.checkpoint.load import fill
from isotune.checkpoint.stored import StoredAdapter
from isotune.errors import CheckpointError, IsotuneError
from isotune.model.attach import build_adapters
from isotune.sites import Site, require_site

Part = tuple[str, Site, list[Adapter]]  # path, bare site, adapters in the order in which they are stacked


def stored_parts(stored: StoredAdapter, base: StoredBase | None) -> Iterator[Part]:
    """Walk the layers of `stored`; without a base their weights are undefined, but their shapes are right.

    Raises CheckpointError where a layer's shape is not that of the base, or is not known without one.
    """
    for p, settings in stored.settings.items():
        layer = stored_layer(*_kind_and_weight(stored, base, p))
        try:
            (adapter,) = build_adapters({p: layer}, {p: settings}, shared=stored.shared).values()
        except IsotuneError as error:
            raise CheckpointError(f"{stored.path} does not fit the base: {error}") from None
        fill(adapter, stored, p, layer)
        yield p, require_site(layer, p), [adapter]


def _kind_and_weight(stored: StoredAdapter, base: StoredBase | None, p: str) -> tuple[str, torch.Tensor]:
    entry = stored.header["sites"][p] if stored.header else None
    if base is not None:
        weight = base.weight(p, entry.get("matrix") if entry else None)
        if entry is not None:
            return entry["kind"], weight
        if weight.dim() == 4:
            return "conv2d", weight
        if "lora_embedding_A" in stored.state[p]:
            return "embedding", weight
        return "conv1d" if stored.config.get("fan_in_fan_out") else "linear", weight
    if entry is None:
        raise CheckpointError(f"{stored.path} does not say how large its layers are; name the base model (--base)")
    return entry["kind"], torch.empty(entry["shape"])
