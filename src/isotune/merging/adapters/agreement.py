"""How far several models agree on one layer, as sums that add up over layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan

import torch
from torch import Tensor

from isotune.linalg.change import dense, product
from isotune.linalg.low_rank import SVD, Factored, svd
from isotune.merging.contract import Aligned

SAMPLE = 2**18
"""About how many entries of each change are looked at for their signs, at one layer."""
_BLOCK = 2**22


@dataclass(frozen=True)
class LayerSums:
    """Sums over one layer that can be added up over layers; T models, all in float64."""

    ranks: list[int]
    products: Tensor
    """(T, T): `<ΔW_i, ΔW_j>`."""
    conflicts: Tensor
    """(2, T, T): `Σ |a b|` over entries of opposite signs, and over all."""
    votes: Tensor
    """(2): what is outvoted, and the whole."""
    others: Tensor | None = None
    """(T): the squared norm of what the others do to the row space of each."""
    values: Tensor | None = None
    """The singular values of the weighted sum, without those that are rounding."""
    rows: Tensor | None = None
    """(T, T): overlaps of row spaces, NaN where there is none."""
    columns: Tensor | None = None
    """(T, T): of column spaces."""


def measured(site: Aligned) -> LayerSums:
    """What one layer adds to how far the models agree."""
    conflicts, votes = _signs(site)
    if not site.factored:
        products = torch.tensor([[product(one, other) for other in site.changes] for one in site.changes])
        ranks = [min(change.shape) if change.any() else 0 for change in site.dense()]
        return LayerSums(ranks, products.double(), conflicts, votes)
    cores = _cores([change for change in site.changes if isinstance(change, Factored)], _rounding(site))
    weighted = [w * (core.U * core.S) @ core.V.mT for core, w in zip(cores, site.weights, strict=True)]
    total = torch.stack(weighted).sum(0)
    others = [((total - own) @ core.V).square().sum() for core, own in zip(cores, weighted, strict=True)]
    values = torch.linalg.svdvals(total)
    largest = max(
        (abs(w) * float(core.S[0]) for core, w in zip(cores, site.weights, strict=True) if len(core.S)), default=0.0
    )
    values = values[values > _rounding(site) * largest]
    return LayerSums(
        [len(core.S) for core in cores],
        torch.tensor([[_product(one, other) for other in cores] for one in cores], dtype=torch.float64),
        conflicts,
        votes,
        torch.stack(others).cpu(),
        values.cpu(),
        torch.tensor([[_overlap(one.V, other.V) for other in cores] for one in cores], dtype=torch.float64),
        torch.tensor([[_overlap(one.U, other.U) for other in cores] for one in cores], dtype=torch.float64),
    )


def _rounding(site: Aligned) -> float:
    """The size of a singular value that is rounding, relative to the largest."""
    dtypes = [change.B.dtype for change in site.changes if isinstance(change, Factored)]
    return max(site.changes[0].shape) * max(torch.finfo(dtype).eps for dtype in dtypes)


def _cores(changes: Sequence[Factored], rounding: float) -> list[SVD]:
    """The SVD of each change in coordinates that all share, those of the QR of the factors side by side."""
    R = torch.linalg.qr(torch.cat([change.B for change in changes], dim=1), mode="r").R.double()
    L = torch.linalg.qr(torch.cat([change.A for change in changes], dim=0).mT, mode="r").R.double()
    ranks = [change.rank for change in changes]
    return [
        svd(Factored(left, right.mT)).supported(rounding)
        for left, right in zip(R.split(ranks, dim=1), L.split(ranks, dim=1), strict=True)
    ]


def _product(one: SVD, other: SVD) -> float:
    return float(((one.U.mT @ other.U) * (one.V.mT @ other.V) * torch.outer(one.S, other.S)).sum())


def _overlap(U: Tensor, V: Tensor) -> float:
    least = min(U.shape[1], V.shape[1])
    return float((U.mT @ V).square().sum()) / least if least else nan


def _signs(site: Aligned) -> tuple[Tensor, Tensor]:
    """`conflicts` and `votes` of the site, from blocks of rows; those of a sample stand for all."""
    changes = [c if isinstance(c, Factored) else c.reshape(len(c) if c.dim() > 1 else 1, -1) for c in site.changes]
    (m, n), count = changes[0].shape, len(changes)
    rows = torch.arange(m)
    if m * n > SAMPLE:
        rows = torch.randperm(m, generator=site.generator("rows"))[: max(SAMPLE // n, 1)]
    weights = torch.tensor(site.weights, dtype=torch.float64)
    conflicts, votes = torch.zeros(2, count, count, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for block in rows.split(max(_BLOCK // (count * n), 1)):
        entries = torch.stack(
            [dense(Factored(c.B[block], c.A) if isinstance(c, Factored) else c[block]).flatten() for c in changes]
        )
        sizes = entries.abs()
        signed, unsigned = (entries @ entries.mT).double().cpu(), (sizes @ sizes.mT).double().cpu()
        conflicts += torch.stack([(unsigned - signed) / 2, unsigned])
        # What is on the smaller side is half of what is lost in adding up.
        whole = weights.abs() @ sizes.sum(dim=1, dtype=torch.float64).cpu()
        kept = (weights.to(entries) @ entries).abs().sum(dtype=torch.float64).cpu()
        votes += torch.stack([(whole - kept).clamp_min(0) / 2, whole])
    scale = m / len(rows)
    return scale * conflicts, scale * votes
