"""Reversible merging (RMM): a few basis models in place of many adapters, from which each is rebuilt by its name.

    position   x_1 .. x_T (r): row j of B_1 .. B_T, or column j of A_1 .. A_T;   x_i = M_j c_ij,   M_j (r x p)
    layer      x_1 .. x_T: all entries of B_1 .. B_T, or of A_1 .. A_T;          x_i = M c_i

with M and c from the SVD of [x_1 .. x_T], so that the sum of the squared errors of the factors is that of the
squared singular values left out. Before that the factors are brought into one gauge (linalg/factor_stack.py).

Paper: "Towards Reversible Model Merging For Low-rank Weights", 2025, arXiv 2510.14163: positions, data-free. The
alignment, the granularity "layer", centring and the tolerance are not in the paper.

Storage for T adapters of rank r: p (r + T) / (r T) of theirs by position, about p / T by layer. Where that is no
saving, the factors are kept as they are. Cost for each layer: QR of the factors and m + n SVDs of r x T matrices.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from isotune.errors import OptionError
from isotune.linalg.factor_stack import FactorStack, aligned, balanced, squares, stacked
from isotune.linalg.low_rank import Factored
from isotune.linalg.precision import at_least_fp32
from isotune.linalg.shared_basis import SharedBasis, shared_basis
from isotune.merging.reversible.stored import Error, Member, Reversible, ReversibleSite
from isotune.progress import counting

Granularity = Literal["position", "layer"]


def compress(
    models: Mapping[str, Mapping[str, Factored]],
    basis: int | None = None,
    tolerance: float | None = None,
    granularity: Granularity = "position",
    center: bool = False,
    align: bool = True,
    progress: bool = False,
) -> Reversible:
    """Compress the changes of several models, given by name and layer.

    The models may have different layers and ranks. A layer where the basis is no smaller than the changes keeps them
    as they are; so does one that a single model has.

    Args:
        models: Each model's changes B A, any scaling folded in.
        basis: The number of basis models for each layer, p; by default 2, where no tolerance is given.
        tolerance: In its place, the largest relative error of a change: each layer takes the smallest basis that
            keeps it for all its models, or keeps the changes as they are.
        granularity: "position": coefficients for every row of B and column of A; "layer": for B and A as a whole.
        center: Take the mean model as one of the basis models.
        align: Bring the factors into one gauge first. Without it they are taken as they are given, which only fits
            adapters that were trained from one start.
        progress: Whether to show a progress bar, on standard error where that is a terminal.

    Raises:
        OptionError: No models, options that cannot be used, or layers that are not of one shape in all models.
    """
    basis = _check_options(models, basis, tolerance, granularity)
    paths = dict.fromkeys(path for changes in models.values() for path in changes)
    problems = list(_shape_problems(models, paths))
    if problems:
        raise OptionError(f"the models do not fit together: {'; '.join(problems)}")
    size = basis if tolerance is None else float(tolerance)
    sites = {}
    with counting("compressing", len(paths), progress) as advance:
        for path in paths:
            sites[path] = _compressed(_of(models, path), size, granularity, center, align)
            advance(1)
    return Reversible(list(models), sites)


def _check_options(models: Any, basis: int | None, tolerance: float | None, granularity: str) -> int:
    if not models:
        raise OptionError("there are no models to compress")
    if basis is not None and tolerance is not None:
        raise OptionError(f"basis={basis} and tolerance={tolerance} cannot both be asked for; give one of them")
    if basis is not None and basis < 1:
        raise OptionError(f"basis={basis} is not usable; it must be at least 1")
    if tolerance is not None and not (tolerance >= 0 and math.isfinite(tolerance)):
        raise OptionError(f"tolerance={tolerance} is not usable; it is a relative error, such as 0.1")
    if granularity not in get_args(Granularity):
        raise OptionError(f"granularity={granularity!r} is not usable; it is {' or '.join(get_args(Granularity))}")
    return 2 if basis is None else basis


def _shape_problems(models: Mapping[str, Mapping[str, Factored]], paths: Iterable[str]) -> Iterable[str]:
    for path in paths:
        shapes = {name: change.shape for name, change in _of(models, path).items()}
        if len(set(shapes.values())) > 1:
            yield f"{path!r} is " + ", ".join(f"{m} x {n} in {name}" for name, (m, n) in shapes.items())


def _of(models: Mapping[str, Mapping[str, Factored]], path: str) -> dict[str, Factored]:
    return {name: changes[path] for name, changes in models.items() if path in changes}


@torch.no_grad()
def _compressed(
    changes: dict[str, Factored], size: int | float, granularity: Granularity, center: bool, align: bool
) -> ReversibleSite:
    """One layer, with `size` basis models (an integer) or to a relative error of `size`."""
    given = [Factored(at_least_fp32(change.B), at_least_fp32(change.A)) for change in changes.values()]
    kept = _kept(dict(zip(changes, given, strict=True)))
    dtype = reduce(torch.promote_types, (change.B.dtype for change in given))
    stack = stacked([Factored(change.B.to(dtype), change.A.to(dtype)) for change in given])
    if align:
        stack = aligned(balanced(stack))
    sides = {"B": stack.B.permute(1, 2, 0), "A": stack.A.permute(2, 1, 0)}  # (positions, r, T)
    if granularity == "layer":
        sides = {side: X.flatten(0, 1)[None] for side, X in sides.items()}
    most = min(next(iter(sides.values())).shape[1:]) + center
    sizes = [min(size, most)] if isinstance(size, int) else range(1, most + 1)
    if not (sizes := [p for p in sizes if _values(stack, sides, p, center) < kept.values]):
        return kept
    whole = {side: shared_basis(X, center) for side, X in sides.items()}
    for p in sizes:
        bases = {side: found.first(p) for side, found in whole.items()}
        errors = _errors(stack, bases, sum(found.left(p) for found in whole.values()))
        if isinstance(size, int) or max(error.change for error in errors) <= size:
            members = map(Member, stack.ranks, (change.rank for change in given), errors)
            return ReversibleSite(kept.shape, dict(zip(changes, members, strict=True)), _tensors(stack, bases))
    return kept


def _kept(changes: dict[str, Factored]) -> ReversibleSite:
    exact = Error(0.0, 0.0, 0.0)
    return ReversibleSite(
        next(iter(changes.values())).shape,
        {name: Member(change.rank, change.rank, exact) for name, change in changes.items()},
        {f"{side}.{i}": getattr(change, side) for i, change in enumerate(changes.values()) for side in "BA"},
    )


def _values(stack: FactorStack, sides: Mapping[str, Tensor], p: int, center: bool) -> int:
    """How many numbers `_tensors` gives for p basis models."""
    coefficients = sum(b * (p - center) * count for b, _, count in (X.shape for X in sides.values()))
    basis = sum(b * d * p for b, d, _ in (X.shape for X in sides.values()))
    return basis + coefficients + sum(rank * stack.rank for rank in stack.ranks if rank < stack.rank)


def _tensors(stack: FactorStack, bases: Mapping[str, SharedBasis]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for side, basis in bases.items():
        # Contiguous, not views of all basis vectors: these would stay in memory.
        found |= {f"{side}.basis": basis.M.contiguous(), f"{side}.coefficients": basis.C.contiguous()}
        if basis.mean is not None:
            found[f"{side}.mean"] = basis.mean
    smaller = [i for i, rank in enumerate(stack.ranks) if rank < stack.rank]
    return found | {f"back.{i}": stack.back[i, : stack.ranks[i]].contiguous() for i in smaller}


def _errors(stack: FactorStack, bases: Mapping[str, SharedBasis], left: Any) -> list[Error]:
    """The error of each model, given what its basis leaves of its factors (T), as a sum of squares."""
    count, r = len(stack.ranks), stack.rank
    B = bases["B"].vectors().reshape(-1, r, count).permute(2, 0, 1)
    A = bases["A"].vectors().reshape(-1, r, count).permute(2, 1, 0)
    if min(stack.ranks) < r:
        own = torch.arange(r, device=B.device) < torch.tensor(stack.ranks, device=B.device)[:, None]
        back = stack.back * own[:, :, None]
        project = back.mT @ back
        B, A = B @ project, project @ A
    dB, dA = B - stack.B, A - stack.A
    # B' A' - B A = (B' - B) A + B' (A' - A), in which nothing cancels.
    change = squares(torch.cat([dB, B], dim=2), torch.cat([stack.A, dA], dim=1))
    factors = dB.double().square().sum((1, 2)) + dA.double().square().sum((1, 2))
    whole = stack.B.double().square().sum((1, 2)) + stack.A.double().square().sum((1, 2))
    parts = ((change, squares(stack.B, stack.A)), (factors, whole), (left, whole))
    tiny = torch.finfo(torch.float64).tiny
    shares = [(part / of.clamp_min(tiny)).sqrt().tolist() for part, of in parts]
    # Of a change of zero nothing can be lost.
    errors = [Error(*of) for of in zip(*shares, strict=True)]
    return [error if rank else Error(0.0, 0.0, 0.0) for error, rank in zip(errors, stack.ranks, strict=True)]
