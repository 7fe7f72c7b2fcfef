"""Spectral variation: how far the singular values, and the singular vectors, of a weight moved.

    values  = mean_i |σ'_i - σ_i|,      vectors = 1 - mean_i (|<u'_i, u_i>| + |<v'_i, v_i>|) / 2,     i = 1 .. k

Source: Cao, "SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation" (arXiv 2409.00055),
which takes all min(out, in) triplets and compares equal indices. In the tail, values lie so close that neighbours
change places and `vectors` tends to one whatever was learned; here only the k leading triplets are compared, and two
further measures do not depend on the order: `matched` pairs old and new vectors for the largest sum of cosines, and
`distance` compares the spaces that the k vectors span.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from isotune.diagnostics.decompositions import Spectra, spectra
from isotune.linalg.assignment import assignment
from isotune.linalg.change import Change


@dataclass(frozen=True)
class Variation:
    """How far the k leading singular triplets moved."""

    values: float
    """`mean |σ'_i - σ_i|`, in the weight's own units."""
    relative: float
    """The same over `mean σ_i`; 0 for a weight of zeros."""
    vectors: float
    """0 where the vectors of equal index agree up to sign, 1 where they are orthogonal."""
    matched: float
    """The same for the best pairing of old and new."""
    distance: float
    """`√(mean sin²)` of the principal angles between the spaces spanned, mean of left and right: 0 to 1."""


def spectral_variation(W: Tensor, change: Change, k: int = 10) -> Variation:
    """The variation of the k leading triplets between W and `W + change` (out, in)."""
    return variation(spectra(W, change, k))


def variation(found: Spectra) -> Variation:
    """The same, of weights that are decomposed already."""
    old, new = found.base.first(found.k), found.adapted
    moved, scale = float((new.S - old.S).abs().mean()), float(old.S.mean())
    cosines = ((old.U.mT @ new.U).abs() + (old.V.mT @ new.V).abs()) / 2
    best = cosines[torch.arange(found.k), assignment(cosines)]
    apart = [_distance(old.U, new.U), _distance(old.V, new.V)]
    return Variation(
        moved,
        moved / scale if scale > 0 else 0.0,
        _one_less(cosines.diagonal()),
        _one_less(best),
        sum(apart) / 2,
    )


def _one_less(cosines: Tensor) -> float:
    return max(0.0, 1 - float(cosines.double().mean()))


def _distance(one: Tensor, other: Tensor) -> float:
    """By the part of one basis outside the other: 1 - cos² would leave the root of rounding where they are equal."""
    outside = other - one @ (one.mT @ other)
    return min(1.0, float(outside.double().norm()) / one.shape[1] ** 0.5)
