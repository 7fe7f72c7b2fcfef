"""Rotations one after the other: the adapters stacked, as one.

    W' = W R_1^w_1 R_2^w_2 ... R_T^w_T     (on the output side W' = (R_1^w_1 ... R_T^w_T)ᵀ W)

With whole weights it is exact, as what the model computes with the adapters stacked in the order given: an HRA's
reflections are put side by side, and the rank is the sum of the ranks. Any other weight takes the rotation that part
of the way from the identity, `exp(w log R)` (see `linalg.orthogonal`); an odd number of reflections has no such way.
On OFT's truncated series the nearest orthogonal matrices are composed, and the result is an exact Cayley transform.

Cost: none beside copying, or O(d k² + k³) a site for k reflections in all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from isotune.errors import OptionError
from isotune.linalg.orthogonal import power
from isotune.merging.rules.families.rotations import MergedRotations, Turn


class Compose(MergedRotations):
    """Orthogonal adapters one after the other, exactly; a weight that is not 1 takes a power of the rotation."""

    name: ClassVar[str] = "compose"
    symmetric: ClassVar[bool] = False

    def normalised(self, weights: Sequence[float]) -> list[float]:
        if not all(map(math.isfinite, weights)):
            raise OptionError(f"compose: the weights {list(weights)} are not usable; all must be finite")
        return list(weights)

    def combined(self, rotations: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        found = torch.eye(rotations[0].shape[-1], dtype=rotations[0].dtype, device=rotations[0].device)
        for R, w in zip(rotations, weights, strict=True):
            found = found @ power(R, w)
        return found

    def columns(self, turns: Sequence[Turn], weights: Sequence[float]) -> Tensor:
        parts = [self._columns_of(turn, w) for turn, w in zip(turns, weights, strict=True)]
        columns = torch.cat(parts, dim=1)
        # More reflections than dimensions are never needed.
        return columns if columns.shape[1] <= len(columns) else super().columns(turns, weights)

    def _columns_of(self, turn: Turn, w: float) -> Tensor:
        if turn.columns is None or w not in (-1, 1):
            return super().columns([turn], [w])
        columns = turn.columns[:, turn.columns.any(dim=0)]  # a zero column stands for no reflection
        return columns if w == 1 else columns.flip(1)
