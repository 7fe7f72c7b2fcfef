"""Mitigation: a new adapter whose intruder dimensions are scaled down.

    dW' = dW + (λ - 1) Σ_j σ_j u_j v_jᵀ     over the intruders j among the leading singular triplets of W + dW

λ = 1 changes nothing, λ = 0 takes the intruders out, λ > 1 makes them larger. Source: Shuttleworth et al. (arXiv
2410.21228), who scale by about 0.7 and win back much of what was forgotten for little of the task; measure both
before relying on it. `dW'` has rank r + |intruders|, which `rank="exact"` keeps: cutting it back to r, as PEFT does,
takes away part of the correction, or of what was learned. The error of that is reported.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from isotune.adapters.contract import Adapter
from isotune.adapters.low_rank.lora import LoRA
from isotune.adapters.settings import Settings
from isotune.checkpoint.files import check_writable
from isotune.checkpoint.parts import changes_bias
from isotune.checkpoint.save import write_parts
from isotune.diagnostics.decompositions import spectra
from isotune.diagnostics.intruders import Side, check_settings, find_intruders
from isotune.diagnostics.sources import AdapterSource, open_source
from isotune.errors import CheckpointError, OptionError
from isotune.folders import TASK
from isotune.linalg.change import Change, size
from isotune.linalg.low_rank import SVD, Factored, from_dense, truncated, weighted_sum
from isotune.progress import counting
from isotune.sites import Site

REPORT = "mitigation.json"

Rank = int | Literal["exact", "same"]


@dataclass(frozen=True)
class Mitigated:
    """What `mitigate` wrote."""

    path: Path
    factor: float
    k: int
    threshold: float
    side: str
    intruders: dict[str, list[int]]
    """The intruders that were scaled, counted from 1, of each layer that has some."""
    ranks: dict[str, int]
    """The rank of the new adapter at each layer."""
    moved: float
    """`|new changes - old changes| / |old changes|` over all layers."""
    errors: dict[str, float]
    """`|written - exact| / |exact|` of each layer's change: what the rank cut off."""
    error: float
    """The same over all layers."""


@torch.no_grad()
def mitigate(
    source: str | Path,
    output: str | Path,
    factor: float = 0.75,
    base: str | Path | None = None,
    *,
    k: int = 10,
    threshold: float = 0.5,
    side: Side = "left",
    rank: Rank = "exact",
    progress: bool = True,
) -> Mitigated:
    """Write an adapter like `source`, a LoRA, in which the intruder dimensions are `factor` times as large.

    Modules trained in full and `task.json` are kept; `mitigation.json` beside them says what was done.

    Args:
        source: An adapter's folder, or its run's.
        output: The folder to write: absent, empty, or an adapter's.
        factor: λ.
        base: The base model; by default what the adapter's config names.
        k: How many leading singular vectors of each weight may be intruders.
        threshold: Below this cosine a vector is an intruder.
        side: As in `diagnose`.
        rank: Of the new adapter: "exact", what it takes; "same", that of the old one; or a number.
        progress: Whether to show a bar on standard error, where that is a terminal.

    Raises:
        OptionError: Settings that mean nothing.
        CheckpointError: A source that is no adapter, or that also changes biases; a base that is not at hand; a
            folder that cannot be written. Nothing is written then.
    """
    check_settings(k, threshold, side)
    if not (factor >= 0 and math.isfinite(factor)):
        raise OptionError(f"factor={factor:g} is not usable; 0 takes the intruders out, 1 leaves them as they are")
    if rank not in ("exact", "same") and not (isinstance(rank, int) and rank > 0):
        raise OptionError(f"rank={rank!r} is not usable; say exact, same, or a number above 0")
    opened = _open(source, base)
    if Path(output).resolve() == opened.path.resolve():
        raise OptionError(f"{output} is the adapter itself; the new one needs another folder")
    check_writable(output)
    work = _Work(opened, factor, k, threshold, side, rank)
    parts: dict[str, tuple[Site, Settings, Adapter]] = {}
    with counting("scaling intruders", len(opened.names), progress) as advance:
        for path in opened.names.values():
            parts[path] = work.part(path)
            advance(1)
    done = work.result(Path(output))
    task = opened.path / TASK
    header = opened.stored.header or {}
    write_parts(
        output,
        parts,
        opened.stored.completed(opened.base).trained,
        replace(opened.stored.base, name=opened.base_model or str(opened.base.folder if opened.base else base)),
        header.get("sites"),
        files={
            REPORT: json.dumps({**asdict(done), "path": None, "source": str(source)}, indent=1),
            TASK: task.read_text(encoding="utf-8") if task.is_file() else None,
        },
    )
    return done


def _open(source: str | Path, base: str | Path | None) -> AdapterSource:
    opened = open_source(source, base)
    if not isinstance(opened, AdapterSource):
        raise CheckpointError(
            f"{source} is a full model; the intruders of an adapter are scaled by a new adapter, and this is none"
        )
    if opened.base is None:
        raise CheckpointError(
            f"the intruders of {source} are found beside its base, "
            + (f"{opened.base_model}, which is not at hand" if opened.base_model else "which it does not name")
            + "; name it with base=... (--base)"
        )
    if not opened.names:
        raise CheckpointError(f"{source} holds no adapted layer, so that there is nothing to scale")
    return opened


class _Work:
    """The layers one by one, and what is reported of them."""

    def __init__(
        self, source: AdapterSource, factor: float, k: int, threshold: float, side: Side, rank: Rank
    ) -> None:
        self.source, self.factor, self.k, self.threshold = source, factor, k, threshold
        self.side, self.rank = side, rank
        self.intruders: dict[str, list[int]] = {}
        self.ranks: dict[str, int] = {}
        self.errors: dict[str, float] = {}
        self.old = self.exact = self.taken = self.cut = 0.0  # squared norms over all layers

    def part(self, path: str) -> tuple[Site, Settings, Adapter]:
        """The layer's new adapter."""
        weight = self.source.at(path)
        site, adapter = weight.site, weight.adapter
        assert site is not None
        assert adapter is not None
        if changes_bias(adapter, site):
            raise CheckpointError(
                f"{adapter.method} also changes the bias of {path!r}, for which a LoRA has no place; "
                "its intruders cannot be scaled by one"
            )
        assert weight.W is not None
        assert weight.change is not None
        both = spectra(weight.W, weight.change, self.k)
        found = find_intruders(both, weight.change, self.threshold, self.side).indices
        chosen = [j - 1 for j in found] if self.factor != 1 else []
        taken = _taken(both.adapted, chosen, self.factor)
        exact = _plus(weight.change, taken) if chosen else weight.change
        factors, self.errors[path] = self._of_rank(path, adapter.method, exact, weight.change)
        if found:
            self.intruders[path] = found
        self.ranks[path] = factors.rank
        norm = size(exact)
        self.old += size(weight.change) ** 2
        self.taken += size(taken) ** 2
        self.exact += norm**2
        self.cut += (self.errors[path] * norm) ** 2
        settings = LoRA(rank=factors.rank)
        return site, settings, settings.adapter(factors.A.contiguous(), factors.B.contiguous(), site)

    def _of_rank(self, path: str, method: str, exact: Change, old: Change) -> tuple[Factored, float]:
        """The factors to store, and the error of their rank."""
        largest = min(exact.shape)
        if isinstance(self.rank, int):
            rank = min(self.rank, largest)
            if not isinstance(exact, Factored):
                return from_dense(exact, rank)
        elif isinstance(exact, Factored) and isinstance(old, Factored):
            rank = largest if self.rank == "exact" else old.rank
        else:
            raise OptionError(
                f"{method} has no exact low-rank form at {path!r}, so that rank={self.rank} is none; give a number "
                "(--rank 16), and look at the error"
            )
        return (exact, 0.0) if exact.rank <= rank else truncated(exact, rank)

    def result(self, path: Path) -> Mitigated:
        """What was done, all layers together."""
        return Mitigated(
            path, self.factor, self.k, self.threshold, self.side, self.intruders, self.ranks,
            _ratio(self.taken, self.old), self.errors, _ratio(self.cut, self.exact),
        )  # fmt: skip


def _ratio(squares: float, of: float) -> float:
    return math.sqrt(squares / of) if of else 0.0


def _taken(adapted: SVD, chosen: list[int], factor: float) -> Factored:
    """`(λ - 1) Σ_j σ_j u_j v_jᵀ` over the chosen triplets."""
    U, S, V = (t[..., chosen] for t in adapted)
    return SVD(U, S, V).factored().scaled(factor - 1)


def _plus(change: Change, more: Factored) -> Change:
    if isinstance(change, Factored):
        return weighted_sum([change, more], [1.0, 1.0])
    return change + more.dense()
