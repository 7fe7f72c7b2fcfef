"""The adapted layers of a stored adapter, rebuilt one at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from isotune.adapters.contract import Adapter
from isotune.adapters.mixture.poly import PolyAdapter
from isotune.checkpoint.base import StoredBase
from isotune.checkpoint.load import fill
from isotune.checkpoint.stored import StoredAdapter
from isotune.errors import CheckpointError, IsotuneError, OptionError
from isotune.model.attach import build_adapters, draw_shared
from isotune.sites import Site, require_site, stored_layer

Part = tuple[str, Site, list[Adapter]]  # path, bare site, adapters in the order in which they are stacked


def stored_parts(stored: StoredAdapter, base: StoredBase | None, task: str | None = None) -> Iterator[Part]:
    """Walk the layers of `stored`; without a base their weights are undefined, but their shapes are right.

    Methods that mix by task are as they are for `task`. Raises CheckpointError where a layer's shape is not that of
    the base, or is not known without one, and OptionError where there is no such task.
    """
    parts = StoredParts(stored, base)
    for p in stored.settings:
        site, adapters = parts.at(p)
        for adapter in () if task is None else adapters:
            if not isinstance(adapter, PolyAdapter):
                raise OptionError(f"{stored.method} mixes nothing by task, so that it has no task {task!r}")
            adapter.task = adapter.settings.place(str(task))
        yield p, site, adapters


class StoredParts:
    """The layers of a stored adapter, each rebuilt when it is asked for."""

    def __init__(self, stored: StoredAdapter, base: StoredBase | None) -> None:
        self.stored, self.base = stored, base
        for p, entry in (stored.header or {"sites": {}})["sites"].items():
            if entry["kind"] == "block":
                raise CheckpointError(
                    f"{stored.path}: the change that {stored.method} makes to the block {p!r} is none of a weight, "
                    "which exporting, merging and diagnosing need"
                )
        self.shared = dict.fromkeys(stored.settings, stored.shared) if stored.shared else _drawn(stored, base)

    def shape(self, p: str) -> list[int]:
        """The shape of the layer's weight in its own layout. Raises CheckpointError where it is not known."""
        return _shape(self.stored, self.base, p)

    def kind(self, p: str) -> str:
        """The kind of site."""
        return _kind(self.stored, p, len(self.shape(p)))

    def at(self, p: str) -> tuple[Site, list[Adapter]]:
        """The bare site at p and its adapters; without a base the site's weight is undefined, its shape is not."""
        stored, base = self.stored, self.base
        weight = _weight(stored, base, p)
        layer = stored_layer(_kind(stored, p, weight.dim()), weight, None if base is None else base.bias(p))
        try:
            (adapter,) = build_adapters({p: layer}, {p: stored.settings[p]}, shared=self.shared).values()
        except IsotuneError as error:
            raise CheckpointError(f"{stored.path} does not fit the base: {error}") from None
        fill(adapter, stored, p, layer)
        return require_site(layer, p), [adapter]


def changes_bias(adapter: Adapter, site: Site) -> bool:
    """Whether the adapter changes the layer's bias, beside its weight."""
    zero = site.bias if site.bias is not None else torch.zeros(site.out_features)
    changed = adapter.bias(zero)
    return changed is not zero and not (changed is not None and changed.equal(zero))


def _weight(stored: StoredAdapter, base: StoredBase | None, p: str) -> torch.Tensor:
    if base is None:
        return torch.empty(_shape(stored, base, p))
    return base.weight(p, stored.header["sites"][p].get("matrix") if stored.header else None)


def _drawn(stored: StoredAdapter, base: StoredBase | None) -> dict[str, dict[str, torch.Tensor]]:
    """What each adapter shares, drawn again for all the layers together: it depends on the largest of them."""
    try:
        return draw_shared(stored.settings, {p: _hollow(stored, base, p) for p in stored.settings})
    except OptionError as error:
        raise CheckpointError(f"{stored.path} cannot be used: {error}") from None


def _hollow(stored: StoredAdapter, base: StoredBase | None, p: str) -> Site:
    """The site at p, of which only the shape is known."""
    shape = _shape(stored, base, p)
    return require_site(stored_layer(_kind(stored, p, len(shape)), torch.empty(shape, device="meta")), p)


def _shape(stored: StoredAdapter, base: StoredBase | None, p: str) -> list[int]:
    if stored.header is not None:
        return list(stored.header["sites"][p]["shape"])
    if base is not None:
        return base.shape(p)
    if (found := _shape_of_lora(stored, p)) is None:
        raise CheckpointError(f"{stored.path} does not say how large its layers are; name the base model (--base)")
    return found


def _shape_of_lora(stored: StoredAdapter, p: str) -> list[int] | None:
    """The shape of a layer's weight as the two factors of a LoRA tell it; None where there are no such tensors."""
    state = stored.state[p]
    if "lora_embedding_A" in state:
        return [state["lora_embedding_A"].shape[1], state["lora_embedding_B"].shape[0]]
    if "lora_A.weight" not in state or "lora_B.weight" not in state:
        return None
    shape = [state["lora_B.weight"].shape[0], *state["lora_A.weight"].shape[1:]]
    return shape[::-1] if stored.config.get("fan_in_fan_out") else shape


def _kind(stored: StoredAdapter, p: str, dimensions: int) -> str:
    if stored.header is not None:
        return str(stored.header["sites"][p]["kind"])
    if dimensions > 2:
        return f"conv{dimensions - 2}d"
    if "lora_embedding_A" in stored.state[p]:
        return "embedding"
    return "gpt2_conv1d" if stored.config.get("fan_in_fan_out") else "linear"
