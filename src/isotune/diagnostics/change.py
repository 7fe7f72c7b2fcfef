"""What an adapter does to each layer: size and rank of the change, and how orthogonal a rotation is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from isotune.adapters.contract import Adapter, Rotation
from isotune.checkpoint.base import StoredBase
from isotune.checkpoint.parts import stored_parts
from isotune.checkpoint.stored import read_stored
from isotune.linalg.householder import at_least_fp32
from isotune.linalg.low_rank import singular_values
from isotune.sites import Site

_PROBES = 64


@dataclass(frozen=True)
class SiteChange:
    """One layer's row in `isotune inspect`."""

    site: str
    kind: str
    method: str
    out_features: int
    in_features: int
    trainable: int
    orthogonality_error: float | None
    """`|v R Rᵀ - v| / |v|` over random rows v for a rotation R; None for what is no rotation."""
    change_norm: float | None
    """`|W' - W| / |W|`, Frobenius; None without the base."""
    change_rank: int | None
    """Numerical rank of W' - W; None without the base."""


@dataclass(frozen=True)
class Inspection:
    """What `inspect_adapter` found."""

    path: Path
    method: str
    base_model: str | None
    trained_modules: list[str]
    sites: list[SiteChange]


def inspect_adapter(path: str | Path, base: str | Path | None = None) -> Inspection:
    """Measure the adapter saved at `path`; the base's weights are read one layer at a time.

    Without `base` (a folder or a hub id) what needs the base's weights stays empty. Raises CheckpointError for a
    damaged adapter, or a base that cannot be used.
    """
    stored = read_stored(path)
    weights = StoredBase(base) if base is not None else None
    rows = [_measure(p, site, adapter, weights is not None) for p, site, (adapter,) in stored_parts(stored, weights)]
    name = stored.config.get("base_model_name_or_path")
    return Inspection(Path(path), stored.method, name, sorted(stored.trained), rows)


@torch.no_grad()
def _measure(p: str, site: Site, adapter: Adapter, with_base: bool) -> SiteChange:
    norm, rank = _change(adapter, at_least_fp32(site.weight)) if with_base else (None, None)
    error = _orthogonality_error(adapter, site) if isinstance(adapter, Rotation) else None
    trainable = sum(parameter.numel() for parameter in adapter.parameters())
    return SiteChange(p, site.kind, adapter.method, site.out_features, site.in_features, trainable, error, norm, rank)


def _change(adapter: Adapter, W: Tensor) -> tuple[float, int]:
    factors = adapter.factors(W)
    values = singular_values(*factors) if factors else torch.linalg.svdvals(adapter.weight(W) - W)
    scale = W.norm()
    # What rounding alone leaves of a change that cancels is no rank.
    noise = 10 * torch.finfo(W.dtype).eps * scale
    return float(values.norm() / scale.clamp_min(1e-30)), int((values > noise).sum())


def _orthogonality_error(adapter: Rotation, site: Site) -> float:
    d = site.in_features if adapter.side == "in" else site.out_features
    v = torch.randn(_PROBES, d, generator=torch.Generator().manual_seed(0))
    back = adapter.rotate(adapter.rotate(v), transpose=True)
    return float((back - v).norm() / v.norm())
