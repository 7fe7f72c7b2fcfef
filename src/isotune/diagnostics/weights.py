"""One adapted matrix as every measure sees it: the weight before, and what the adaptation adds to it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from isotune.adapters.contract import Adapter, LowRank
from isotune.errors import CheckpointError
from isotune.linalg.change import Change
from isotune.linalg.low_rank import Factored
from isotune.linalg.precision import at_least_fp32
from isotune.sites import Site


@dataclass(frozen=True)
class Weight:
    """A matrix W (out, in) and its change, in fp32 or better."""

    path: str
    kind: str
    method: str
    shape: tuple[int, int]
    trainable: int
    W: Tensor | None
    """None without the base."""
    change: Change | None
    """None where the change depends on W, which is not at hand."""
    adapter: Adapter | None = None
    """None for a matrix of a full checkpoint."""
    site: Site | None = None
    """The bare layer that the adapter is on; without the base only its shape is right."""

    def to(self, device: torch.device | str) -> Weight:
        """The same on another device; the adapter and its layer stay where they are."""
        W = None if self.W is None else self.W.to(device)
        change = self.change
        if isinstance(change, Factored):
            change = Factored(change.B.to(device), change.A.to(device))
        elif change is not None:
            change = change.to(device)
        return replace(self, W=W, change=change)


def exact_change(adapter: Adapter, site: Site, with_base: bool) -> Change | None:
    """What the adapter adds to the site's weight; None where that depends on a weight that is not at hand."""
    if with_base:
        W = at_least_fp32(site.weight)
        pair = adapter.factors(W)
        return adapter.weight(W) - W if pair is None else Factored(*map(at_least_fp32, pair))
    if isinstance(adapter, LowRank) and type(adapter).factors is LowRank.factors:
        return Factored(*map(at_least_fp32, adapter.change()))
    return None


def require_finite(weight: Weight, path: object) -> Weight:
    """The weight itself. Raises CheckpointError where it or its change holds NaN or infinity."""
    change = (
        []
        if weight.change is None
        else list(weight.change)
        if isinstance(weight.change, Factored)
        else [weight.change]
    )
    for tensor in [*change, *([] if weight.W is None else [weight.W])]:
        if tensor.numel() and not all(x.isfinite() for x in tensor.aminmax()):
            raise CheckpointError(
                f"{path}, or its base, holds values that are not finite (NaN or infinity) at {weight.path!r}; "
                "restore the files from their source"
            )
    return weight
