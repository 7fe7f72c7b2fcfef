"""How far models agree before they are merged: sizes, angles, signs, subspaces, and what a smaller rank would cost.

Everything is computed from the changes alone, without the base. With ΔW_i = B_i A_i, [B_1 | … | B_T] = Q R and
[A_1; …; A_T]ᵀ = P L, all of it but the signs is about the small cores K_i = R_i L_iᵀ, since ΔW_i = Q K_i Pᵀ; neither
Q nor P is formed. Signs are compared entry by entry, on a sample of rows where the weight is large.
Cost for each layer and k = Σ r_i: O((m + n) k² + k³), and T matrices of about 2¹⁸ entries.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import nan

import torch
from torch import Tensor

from isotune.errors import OptionError
from isotune.merging.adapters.agreement import LayerSums, measured
from isotune.merging.contract import Aligned, AnyRule, Rule
from isotune.merging.registry import rule_class


@dataclass(frozen=True)
class Pair:
    """Two models compared. The weights do not matter."""

    models: tuple[str, str]
    cosine: float
    """`<ΔW_i, ΔW_j> / (|ΔW_i| |ΔW_j|)` in the Frobenius norm; 0 where one is zero."""
    sign_conflict: float
    """`Σ |a b|` over entries of opposite signs, as a share of all: 0 in agreement, 1 for opposites, by chance 1/2."""
    row_overlap: float | None
    """The mean squared cosine of the principal angles between the row spaces (what inputs they read): 1 where one
    contains the other. None where it is not known: for dense changes, or where a model leaves the layers alone."""
    column_overlap: float | None
    """The same of the column spaces: what outputs they write to."""


@dataclass(frozen=True)
class Agreement:
    """How far several models agree on one layer, or on all of them together."""

    norms: dict[str, float]
    """Of each model's change, Frobenius."""
    pairs: list[Pair]
    """Each two models once, in their order."""
    outvoted: float
    """The share of `Σ_i |w_i ΔW_i|`, summed over entries, whose sign is not that of `Σ_i w_i ΔW_i` there."""
    interference: dict[str, float] | None
    """`|Σ_{j≠i} w_j ΔW_j P_i| / |ΔW_i|` for each model i, with P_i the projector on its row space: what the others do
    to the inputs that it reads, next to what it does. 0 for a model that changes nothing. None for dense changes."""
    truncation: dict[int, float] | None
    """By rank, the error of the best approximation of `Σ_i w_i ΔW_i`, relative to it. None for dense changes."""


@dataclass(frozen=True)
class SiteAgreement:
    """One layer."""

    path: str
    shape: tuple[int, ...]
    ranks: dict[str, int]
    """The numerical rank of each model's change; for dense changes its smaller side, or 0."""
    agreement: Agreement


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; plain values, which `dataclasses.asdict` makes ready for JSON."""

    rule: str
    weights: dict[str, float]
    """By the model's name."""
    notes: list[str]
    """What to know of the rule."""
    overall: Agreement
    """Of all layers together: norms, products and errors are added up, overlaps are averaged over the layers."""
    sites: list[SiteAgreement]


@torch.no_grad()
def explain(sites: Iterable[Aligned], rule: str) -> Explanation:
    """Say how far the models agree at each layer and overall, before they are merged by a rule.

    Args:
        sites: The layers, walked once; one of them is in memory at a time. Factored changes tell the most.
        rule: The rule's name, for the notes.

    Raises:
        OptionError: An unknown rule, or no layers.
    """
    kind = rule_class(rule)
    shapes, ranks, measures = {}, {}, []
    names: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    for site in sites:
        names, weights = site.names, site.weights
        measure = measured(site)
        measures.append(measure)
        shapes[site.path], ranks[site.path] = tuple(site.changes[0].shape), measure.ranks
    if not measures:
        raise OptionError("there are no layers to compare")
    notes = _notes(kind, len(names))
    steps = _steps(measures)
    found = [
        SiteAgreement(path, shapes[path], dict(zip(names, ranks[path], strict=True)), _agreement([m], names, steps))
        for path, m in zip(shapes, measures, strict=True)
    ]
    overall = _agreement(measures, names, steps)
    return Explanation(rule, dict(zip(names, weights, strict=True)), notes, overall, found)


def _steps(measures: Sequence[LayerSums]) -> list[int]:
    """The largest rank of one change, twice that, and so on up to the largest rank of a sum."""
    factored = [measure for measure in measures if measure.values is not None]
    rank = max((rank for measure in factored for rank in measure.ranks), default=0)
    most = max((len(m.values) for m in factored if m.values is not None), default=0)
    steps = []
    while 0 < rank < most:
        steps.append(rank)
        rank *= 2
    return [*steps, most] if most else []


def _agreement(measures: Sequence[LayerSums], names: Sequence[str], steps: Sequence[int]) -> Agreement:
    """The measures added up, and what follows from the sums."""
    products = torch.stack([measure.products for measure in measures]).sum(0)
    norms = products.diagonal().clamp_min(0).sqrt()
    cosines = _share(products, torch.outer(norms, norms)).clamp(-1, 1)
    opposite, all_signs = torch.stack([measure.conflicts for measure in measures]).sum(0)
    conflicts = _share(opposite, all_signs)
    outvoted, whole = torch.stack([measure.votes for measure in measures]).sum(0)
    factored = [measure for measure in measures if measure.values is not None]
    rows, columns = (
        torch.stack(of).nanmean(0) if (of := [getattr(m, side) for m in factored]) else torch.full_like(products, nan)
        for side in ("rows", "columns")
    )
    count = range(len(names))
    return Agreement(
        dict(zip(names, norms.tolist(), strict=True)),
        [
            Pair(
                (names[i], names[j]),
                float(cosines[i, j]),
                float(conflicts[i, j]),
                _or_none(rows[i, j]),
                _or_none(columns[i, j]),
            )
            for i in count
            for j in count
            if i < j
        ],
        float(_share(outvoted, whole)),
        dict(zip(names, _interference(factored).tolist(), strict=True)) if factored else None,
        {step: _truncation(factored, step) for step in steps} if factored else None,
    )


def _interference(measures: Sequence[LayerSums]) -> Tensor:
    """`interference` of each model (T)."""
    others = torch.stack([measure.others for measure in measures if measure.others is not None]).sum(0)
    own = torch.stack([measure.products.diagonal() for measure in measures]).sum(0)
    return _share(others, own).sqrt()


def _truncation(measures: Sequence[LayerSums], rank: int) -> float:
    """The error of the sum at that rank in every layer."""
    squares = [measure.values.square() for measure in measures if measure.values is not None]
    left, whole = (sum((float(S[start:].sum()) for S in squares), 0.0) for start in (rank, 0))
    return (left / whole) ** 0.5 if whole else 0.0


def _share(part: Tensor, whole: Tensor) -> Tensor:
    """`part / whole`; 0 where the whole is 0."""
    return torch.where(whole > 0, part / whole.clamp_min(torch.finfo(whole.dtype).tiny), 0)


def _or_none(value: Tensor) -> float | None:
    return None if value.isnan() else float(value)


def _notes(rule: type[AnyRule], count: int) -> list[str]:
    """What a user should know of the rule before it runs."""
    notes = []
    least, most = rule.models
    if count < least or (most is not None and count > most):
        limits = f"{least} or more" if most is None else f"{least} to {most}" if least < most else f"exactly {least}"
        notes.append(f"{rule.name} takes {limits} models; there are {count}")
    if not rule.symmetric:
        notes.append(f"the order of the models matters to {rule.name}")
    if rule.random:
        notes.append(f"{rule.name} draws: its result depends on the seed")
    if not issubclass(rule, Rule):
        return [*notes, f"{rule.name} merges rotations, not changes; the figures are those of their changes"]
    if not rule.exact_rank:
        notes.append(f"{rule.name} works on single entries: its result has full rank, and is cut down to a rank")
    if rule.equal_ranks:
        notes.append(f"{rule.name} needs changes of one rank at each layer")
    if rule.statistic is not None:
        notes.append(f"{rule.name} needs a statistic of each model's weights: {rule.statistic}")
    return notes
