"""The mean of rotations on the orthogonal group: the Karcher mean.

    M = argmin Σ w_i |log(MᵀR_i)|_F²,   Σ w_i = 1,   where Σ w_i log(MᵀR_i) = 0

It lies on the shortest way between two rotations, turns a common plane by the mean angle, and is orthogonal, as the
mean of the matrices is not. It is found inside the space that the rotations turn together (see `linalg.orthogonal`):
for reflections of k columns in all the result has at most k; blocks are averaged one by one. Rotations of which some
have the determinant 1 and some -1 (an even and an odd number of reflections) have no mean, nor have some that lie
180 degrees apart. On truncated series (OFT's `terms`, HOFT's `inverse`) the nearest orthogonal matrices are averaged.

mergekit's rule of this name is another: the mean of whole weights, flattened, on a sphere, which keeps their length
and not their singular values.

Sources: Karcher, "Riemannian center of mass and mollifier smoothing" (1977); Manton, "A globally convergent numerical
algorithm for computing the centre of mass on compact Lie groups" (2004). Cost: O(d k² + T k³) a site and step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from isotune.errors import OptionError
from isotune.linalg.orthogonal import mean
from isotune.merging.rules.families.rotations import MergedRotations


class Karcher(MergedRotations):
    """The weighted mean of orthogonal adapters, as rotations."""

    name: ClassVar[str] = "karcher"
    absent: ClassVar[Literal["skip", "identity"]] = "identity"

    steps: int = Field(500, gt=0, description="Steps after which it has to have converged.")

    def normalised(self, weights: Sequence[float]) -> list[float]:
        total = sum(weights)
        if not (math.isfinite(total) and total > 0 and min(weights) >= 0):
            raise OptionError(
                f"karcher: the weights {list(weights)} are not usable; a mean needs weights of 0 or more, not all 0"
            )
        return [w / total for w in weights]

    def combined(self, rotations: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        # A rotation of weight 0 need not be near the others.
        used = [i for i, w in enumerate(weights) if w > 0]
        return mean([rotations[i] for i in used], [weights[i] for i in used], self.steps)
