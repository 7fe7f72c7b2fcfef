"""Orthogonal adapters as small orthogonal matrices, merged, and made adapters again.

A product of reflections turns a few directions and leaves the rest: R = Q K Qᵀ + (I - Q Qᵀ), with Q (d x k) a basis
of what several of them turn together and one K (k x k) for each. A block-diagonal rotation is its blocks. A rule says
how such matrices become one; here they are found in the adapters, and the result becomes an adapter again:

    hra     the reflections that K is, at most k
    ether   likewise, as an HRA: a product of two of its rotations is not of its own form
    hoft    each side by itself, and the shorter one padded
    oft     block by block, back through the inverse Cayley transform

All in fp64; the result has the dtype of what was merged. No d x d matrix is formed unless the ranks add up to d.
What only concerns training (starts, `strict`, penalties, COFT's radius, dropout) is not carried over.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from isotune.adapters.contract import Adapter, Side
from isotune.adapters.orthogonal.ether import ETHERAdapter
from isotune.adapters.orthogonal.hoft import HOFT, HOFTAdapter, Reflections
from isotune.adapters.orthogonal.hra import HRA, HRAAdapter
from isotune.adapters.orthogonal.oft import OFT, OFTAdapter
from isotune.adapters.settings import Settings
from isotune.adapters.thin_rotation import ThinRotation
from isotune.errors import OptionError
from isotune.linalg.cayley import cayley, inverse_cayley, rotation, upper_of
from isotune.linalg.householder import block_columns, compact_wy
from isotune.linalg.orthogonal import nearest_orthogonal, reflections
from isotune.merging.contract import RotationRule
from isotune.sites import Site

Part = tuple[Settings, Adapter]

CLOSE = 1e-2
"""How far a truncated rotation may be from an orthogonal matrix, to be merged as the nearest one."""
STORED = 1e-4
"""How far the merged rotation, as an adapter stores it, may be from what was computed."""


class Turn(NamedTuple):
    """One side of an adapter, `R = I - U M` in `W R` or `Rᵀ W`, with U (d, r) and M (r, d), in fp64."""

    U: Tensor
    M: Tensor
    columns: Tensor | None
    """The reflections that R is a product of (d, r), in order; None where it is not exactly one."""


class MergedRotations(RotationRule):
    """A rule that makes orthogonal matrices one, whatever they are the matrices of."""

    def merge(self, site: Site, parts: Sequence[Part], weights: Sequence[float]) -> Part:
        if not parts:
            raise OptionError(f"{self.name}: there is no adapter to merge")
        names = sorted({adapter.method for _, adapter in parts})
        if len(names) > 1:
            raise OptionError(
                f"{self.name} merges rotations of one method, and here are {' and '.join(names)}; merge their "
                "changes instead, with a rule such as sum"
            )
        merge = _BY_METHOD.get(names[0])
        if merge is None:
            raise OptionError(
                f"{self.name} merges the rotations of {', '.join(_BY_METHOD)}, and {names[0]} is none of them; "
                "merge its changes instead, with a rule such as sum"
            )
        weights = self.normalised(weights)
        if len(parts) == 1 and weights[0] == 1:
            return parts[0][0], copy.deepcopy(parts[0][1])
        dtype = next(parts[0][1].parameters()).dtype
        with torch.no_grad():
            try:
                settings, adapter = merge(self, parts, weights)
            except ValueError as error:
                raise OptionError(f"{self.name} cannot merge these {names[0]} rotations: {error}") from None
        return settings, adapter.to(dtype)

    @abstractmethod
    def normalised(self, weights: Sequence[float]) -> list[float]:
        """The weights as `combined` takes them. Raises OptionError for weights that cannot be used."""

    @abstractmethod
    def combined(self, rotations: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """One orthogonal matrix (..., k, k) of several, each as R in `W R`. Raises ValueError where there is none."""

    def columns(self, turns: Sequence[Turn], weights: Sequence[float]) -> Tensor:
        """The reflections (d, s) whose product is the merged rotation."""
        Q, _ = torch.linalg.qr(torch.cat([turn.U for turn in turns], dim=1))
        eye = torch.eye(Q.shape[1], dtype=Q.dtype, device=Q.device)
        small = [_orthogonal(eye - (Q.mT @ turn.U) @ (turn.M @ Q)) for turn in turns]
        return Q @ reflections(self.combined(small, weights))


def _orthogonal(R: Tensor) -> Tensor:
    """R (..., k, k), or the orthogonal matrices nearest to it where it is a truncated series.

    Raises ValueError where these are not near.
    """
    nearest = nearest_orthogonal(R)
    off = float((R - nearest).abs().max())
    if off > CLOSE:
        raise ValueError(
            f"one of them is off an orthogonal matrix by {off:.1e}, because its series (terms=..., or "
            "inverse='neumann2') has not converged; merge their changes instead, with a rule such as sum"
        )
    return nearest


def _turn(adapter: ThinRotation) -> Turn:
    # Cast after the columns are made: strict ones are orthonormal, and dependent, to the precision they are used in.
    if isinstance(adapter, HRAAdapter):
        columns = adapter.columns().double()
    elif isinstance(adapter, ETHERAdapter):
        columns = block_columns(adapter.u).double()
    elif isinstance(adapter, Reflections) and adapter.inverse == "exact":
        # Its Q is R on the input side and Rᵀ on the output side.
        columns = (adapter.U if adapter.side == "in" else adapter.U.flip(1)).double()
    else:
        return Turn(*copy.deepcopy(adapter).double().thin(), None)
    return Turn(*compact_wy(columns), columns)


def _side(adapters: Sequence[Any]) -> Side:
    """The one side that all adapters rotate."""
    sides = {adapter.side for adapter in adapters}
    if len(sides) > 1:
        raise ValueError("some rotate the input and some the output; W R and Rᵀ W have no common form")
    return sides.pop()


def _turns(adapters: Sequence[ThinRotation]) -> list[Turn]:
    turns = [_turn(adapter) for adapter in adapters]
    if len(sizes := sorted({len(turn.U) for turn in turns})) > 1:
        raise ValueError(f"they turn spaces of different size, {' and '.join(map(str, sizes))}")
    return turns


def _padded(U: Tensor, rank: int) -> Tensor:
    """The reflections U (d, s) and then pairs of equal ones, which cancel; a last single one is zero, and idle."""
    d, s = U.shape
    pairs = torch.eye(d, dtype=U.dtype, device=U.device)[:, torch.arange((rank - s) // 2) % d]
    return torch.cat([U, pairs.repeat_interleave(2, dim=1), U.new_zeros(d, (rank - s) % 2)], dim=1)


def _reflections(rule: MergedRotations, parts: Sequence[tuple[Any, Any]], weights: Sequence[float]) -> Part:
    """HRA, and ETHER as HRA."""
    adapters = [adapter for _, adapter in parts]
    side = _side(adapters)
    U = rule.columns(_turns(adapters), weights)
    if not U.shape[1]:
        U = _padded(U, min(2, len(U)))
    first = parts[0][0]
    settings = HRA(rank=U.shape[1], side=first.side if isinstance(first, HRA) else side, start="random")
    return settings, HRAAdapter(U, None, side)


def _two_sided(rule: MergedRotations, parts: Sequence[tuple[Any, Any]], weights: Sequence[float]) -> Part:
    """HOFT."""
    adapters = [adapter for _, adapter in parts]
    V = rule.columns(_turns([adapter.inner for adapter in adapters]), weights)
    U = rule.columns(_turns([adapter.outer for adapter in adapters]), weights).flip(1)
    rank, limit = max(2, V.shape[1], U.shape[1]), min(len(V), len(U))
    if rank > limit:
        raise ValueError(f"together they are {rank} reflections, and at this layer hoft holds {limit} at most")
    inner, outer = Reflections(_padded(V, rank), "in"), Reflections(_padded(U, rank), "out")
    return HOFT(rank=rank), HOFTAdapter(inner, outer)


def _blocks(rule: MergedRotations, parts: Sequence[tuple[Any, Any]], weights: Sequence[float]) -> Part:
    """OFT."""
    adapters: list[OFTAdapter] = [adapter for _, adapter in parts]
    side = _side(adapters)
    if any(adapter.s is not None for adapter in adapters):
        raise ValueError("one of them scales the outputs, too (magnitude), which is no rotation")
    blocks = [_orthogonal(rotation(adapter.Q.double(), adapter.b, adapter.terms)) for adapter in adapters]
    if len(sizes := sorted({adapter.b for adapter in adapters})) > 1:
        raise ValueError(f"their blocks are of different size, {' and '.join(map(str, sizes))}")
    share = all(settings.share for settings, _ in parts)
    if len(counts := {len(B) for B, (settings, _) in zip(blocks, parts, strict=True) if not settings.share}) > 1:
        raise ValueError(f"they have different numbers of blocks, {' and '.join(map(str, sorted(counts)))}")
    # On the input side W becomes W Rᵀ.
    turned = [B.mT for B in blocks] if side == "in" else blocks
    R = rule.combined(torch.broadcast_tensors(*turned), weights)
    Q = inverse_cayley(R.mT if side == "in" else R)
    rounded = Q.float().double()
    if float((cayley(rounded) - cayley(Q)).abs().max()) > STORED:
        raise ValueError(
            "the result turns something by so nearly 180 degrees that its Cayley transform is too coarse"
        )
    first = parts[0][0].model_dump(include={"block", "blocks", "nearest"}, exclude_unset=True)
    return OFT(**first, share=share), OFTAdapter(upper_of(Q), sizes[0], side)


_Merge = Callable[[MergedRotations, Sequence[Part], Sequence[float]], Part]
_BY_METHOD: dict[str, _Merge] = {"hra": _reflections, "ether": _reflections, "hoft": _two_sided, "oft": _blocks}
