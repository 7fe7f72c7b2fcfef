"""All measures of one adaptation, or of several of one base, in one walk over the weights."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from isotune.diagnostics.decompositions import spectra
from isotune.diagnostics.diagnosis import Diagnosis, DiagnosisSettings, SiteDiagnosis, Survey, Total
from isotune.diagnostics.intruders import Side, check_settings, find_intruders
from isotune.diagnostics.overlap import Overlap, SiteOverlap, directions, subspace_overlap
from isotune.diagnostics.rotations import orthogonality_error, rotation_angles
from isotune.diagnostics.sizes import effective_rank, numerical_rank
from isotune.diagnostics.sources import Source, open_source
from isotune.diagnostics.variation import variation
from isotune.diagnostics.weights import Weight
from isotune.errors import OptionError
from isotune.linalg.change import change_values, size
from isotune.linalg.low_rank import SVD, dense_svd
from isotune.progress import counting

_VALUES = 64


@dataclass
class _Row:
    """A weight's measures, and the two norms from which those of all weights together are made."""

    site: SiteDiagnosis
    change: float | None
    weight: float | None


@dataclass
class _Bases:
    """The decompositions of one weight, by the base that it is of."""

    found: dict[Path, SVD] = field(default_factory=dict)

    def of(self, source: Source, weight: Weight) -> SVD:
        assert source.base is not None
        assert weight.W is not None
        if source.base.folder not in self.found:
            self.found[source.base.folder] = dense_svd(weight.W)
        return self.found[source.base.folder]


def diagnose(
    source: str | Path,
    base: str | Path | None = None,
    *,
    k: int = 10,
    threshold: float = 0.5,
    side: Side = "left",
    spectral: bool = True,
    only: str | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Diagnosis:
    """Measure what an adaptation did to the weights of a model.

    Args:
        source: An adapter's folder, isotune's or PEFT's; a run's; or a model that was trained in full.
        base: The model that it started from, a folder or a hub id; by default what the source names, where that is
            at hand. Without it an adapter is measured as far as it can be; a full model needs it.
        k: How many leading singular triplets of each weight to look at.
        threshold: Below this cosine a singular vector is an intruder.
        side: Whose singular vectors: "left" (the paper), "right", or "both" (the smaller cosine of the two).
        spectral: Whether to decompose each weight of the base, at O(out in min(out, in)); without, there are no
            singular values of weights, no intruders and no variation.
        only: A regular expression; weights whose path it is not found in are skipped.
        device: Where to compute.
        progress: Whether to show a bar on standard error, where that is a terminal.

    Raises:
        OptionError: Settings that mean nothing, or an `only` that finds no weight.
        CheckpointError: A source or a base that cannot be used.
    """
    return survey(
        [source], base, k=k, threshold=threshold, side=side, spectral=spectral, only=only, device=device,
        progress=progress,
    ).diagnoses[0]  # fmt: skip


def survey(
    sources: Sequence[str | Path],
    base: str | Path | None = None,
    *,
    k: int = 10,
    threshold: float = 0.5,
    side: Side = "left",
    spectral: bool = True,
    only: str | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Survey:
    """Diagnose several adaptations and compare the spaces of their changes.

    Arguments and errors are those of `diagnose`. One weight at a time is in memory, and each weight of the base is
    decomposed once for all adaptations of it.
    """
    check_settings(k, threshold, side)
    if not sources:
        raise OptionError("there is nothing to diagnose; name at least one adapter, run or model")
    _check_device(device)
    opened = [open_source(source, base) for source in sources]
    settings = DiagnosisSettings(k, threshold, side)
    names = _chosen(opened, only)
    rows: list[dict[str, _Row]] = [{} for _ in opened]
    overlaps: dict[tuple[int, int], list[SiteOverlap]] = {
        p: [] for p in itertools.combinations(range(len(opened)), 2)
    }
    with counting("diagnosing", sum(name in s.names for name in names for s in opened), progress) as advance:
        for name in names:
            found = _at(name, opened, settings, spectral, device, rows, advance)
            for i, j in itertools.combinations(found, 2):
                if (own := subspace_overlap(found[i], found[j], opened[i].names[name])) is not None:
                    overlaps[i, j].append(own)
    paths = [str(source) for source in sources]
    return Survey(
        [_diagnosis(path, s, settings, own) for path, s, own in zip(paths, opened, rows, strict=True)],
        [Overlap.of((paths[i], paths[j]), own) for (i, j), own in overlaps.items()],
    )


def _check_device(device: str | torch.device) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).partition("\n")[0]
        raise OptionError(f"device={str(device)!r} is not usable: {first}") from None


def _chosen(opened: Sequence[Source], only: str | None) -> list[str]:
    """The names of the weights to measure, in the order of the first source that has them."""
    try:
        wanted = re.compile(only or "")
    except re.error as error:
        raise OptionError(f"only={only!r} is no regular expression: {error}") from None
    names = dict.fromkeys(name for s in opened for name, path in s.names.items() if wanted.search(path))
    if only and not names:
        some = ", ".join(itertools.islice(opened[0].names.values(), 3))
        raise OptionError(f"only={only!r} is found in the path of no weight; there are {some}, ...")
    return list(names)


@torch.no_grad()
def _at(
    name: str,
    opened: Sequence[Source],
    settings: DiagnosisSettings,
    spectral: bool,
    device: str | torch.device,
    rows: list[dict[str, _Row]],
    advance: Callable[[int], None],
) -> dict[int, SVD]:
    """Measure one weight in every source that has it; the directions of its changes, where they are compared."""
    bases, found = _Bases(), {}
    for i, source in enumerate(opened):
        if name not in source.names:
            continue
        weight = source.at(source.names[name]).to(device)
        decomposed = bases.of(source, weight) if spectral and weight.W is not None else None
        rows[i][name] = _measured(weight, decomposed, settings)
        if len(opened) > 1 and weight.change is not None:
            found[i] = directions(weight.change, settings.k)
        advance(1)
    return found


def _measured(weight: Weight, base: SVD | None, settings: DiagnosisSettings) -> _Row:
    adapter, change = weight.adapter, weight.change
    norm = None if weight.W is None else float(torch.linalg.vector_norm(weight.W, dtype=torch.float64))
    moved = None if change is None else size(change)
    values = None if change is None else change_values(change)
    angles = None if adapter is None else rotation_angles(adapter, weight.shape)
    row = SiteDiagnosis(
        site=weight.path,
        kind=weight.kind,
        method=weight.method,
        out_features=weight.shape[0],
        in_features=weight.shape[1],
        trainable=weight.trainable,
        orthogonality_error=None if adapter is None else orthogonality_error(adapter, weight.shape),
        change_norm=None if moved is None or norm is None else moved / max(norm, 1e-30),
        change_rank=None if values is None else numerical_rank(values, norm or 0.0),
        share=None,
        effective_rank=None if values is None else effective_rank(values),
        change_values=None if values is None else values[:_VALUES].tolist(),
        weight_values=None,
        adapted_values=None,
        similarity=None,
        window_similarity=None,
        intruders=None,
        intruder_share=None,
        variation=None,
        angles=None if angles is None else angles.tolist(),
    )
    if base is not None and weight.W is not None and change is not None:
        both = spectra(weight.W, change, settings.k, base)
        intruders = find_intruders(both, change, settings.threshold, settings.side)  # type: ignore[arg-type]
        row = replace(
            row,
            weight_values=both.base.S[: both.k].tolist(),
            adapted_values=both.adapted.S.tolist(),
            similarity=intruders.similarity.tolist(),
            window_similarity=intruders.window.tolist(),
            intruders=intruders.indices,
            intruder_share=intruders.share,
            variation=variation(both),
        )
    return _Row(row, moved, norm)


def _diagnosis(path: str, source: Source, settings: DiagnosisSettings, found: dict[str, _Row]) -> Diagnosis:
    rows = [found[name] for name in source.names if name in found]
    squares = [None if row.change is None else row.change**2 for row in rows]
    known = [square for square in squares if square is not None]
    total = math.fsum(known) if len(known) == len(rows) else None
    weights = [row.weight for row in rows]
    scale = math.sqrt(math.fsum(w**2 for w in weights if w is not None)) if None not in weights else None
    sites = [
        row.site if total is None or square is None else replace(row.site, share=square / total if total else 0.0)
        for row, square in zip(rows, squares, strict=True)
    ]
    counted = [site.intruders for site in sites if site.intruders is not None]
    all_counted = bool(sites) and len(counted) == len(sites)
    return Diagnosis(
        path,
        source.kind,
        source.method,
        source.base_model,
        settings,
        Total(
            len(sites),
            sum(site.trainable for site in sites),
            math.sqrt(total) / scale if total is not None and scale else None,
            sum(map(len, counted)) if all_counted else None,
            sum(map(bool, counted)) if all_counted else None,
        ),
        sites,
        source.trained_modules,
        source.left_out,
    )
