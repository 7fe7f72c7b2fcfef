"""HOFT, Householder orthogonal fine-tuning: products of reflections on both sides of the weight.

    W' = Q_U W Q_V,   Q_U = I - U S_U⁻¹ Uᵀ (out x out),   Q_V = I - V S_V⁻¹ Vᵀ (in x in)

with U (out x r) and V (in x r) trained and S as in `linalg.householder`. The singular values of W are kept, and
W' - W has rank at most 2 r. The paper replaces S⁻¹ by two terms of its Neumann series (`inverse="neumann2"`), with
which Q is not orthogonal and, for r >= 4, the start is not the identity; the exact triangular solve is the default.

The vectors start in equal pairs, which cancel. An odd r has a zero vector at its end: it stands for no reflection,
and as the gradient there is zero, it stays; r - 1 does the same with fewer parameters.

Paper: "HOFT: Householder Orthogonal Fine-tuning", 2025, arXiv 2505.16531. Parameters: r (in + out).
Cost for n rows: 4 n r (in + out) + 2 r² (in + out) flops.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from isotune.adapters.contract import Side
from isotune.adapters.orthogonal.two_sided import TwoSided
from isotune.adapters.settings import Settings, check_rank
from isotune.adapters.thin_rotation import ThinRotation
from isotune.kernels.householder import compact_wy
from isotune.linalg.householder import mean_length, neumann_wy
from isotune.linalg.precision import rounded
from isotune.sites import CONVOLUTIONS, LINEAR, Site

Inverse = Literal["exact", "neumann2"]


class HOFT(Settings):
    """W' = Q_U W Q_V: products of r learned Householder reflections on both sides of the weight."""

    name: ClassVar[str] = "hoft"
    kinds: ClassVar[frozenset[str]] = LINEAR | CONVOLUTIONS
    learning_rate: ClassVar[float] = 1e-2
    formula: ClassVar[str] = "rank * (n_in + n_out)"

    rank: int = Field(8, ge=2, description="Number of reflections on each side; even, or the last one is idle.")
    inverse: Inverse = Field(
        "exact", description="Solve with S exactly, or as the paper does: neumann2, which is not orthogonal."
    )

    @property
    def identity_at_start(self) -> bool:
        # Two terms are exact for one pair; the products between pairs do not cancel.
        return self.inverse == "exact" or self.rank < 4

    def _sides(self, site: Site, generator: torch.Generator) -> tuple[Reflections, Reflections]:
        check_rank(self.rank, min(site.in_features, site.out_features), "its smaller side")
        V, U = (_pairs(d, self.rank, generator) for d in (site.in_features, site.out_features))
        return Reflections(V, "in", self.inverse), Reflections(U, "out", self.inverse)

    def build(self, site: Site, generator: torch.Generator) -> HOFTAdapter:
        return HOFTAdapter(*self._sides(site, generator))

    def parameter_count(self, site: Site) -> int:
        return self.rank * (site.in_features + site.out_features)


def _pairs(d: int, rank: int, generator: torch.Generator) -> Tensor:
    """Gaussian columns (d x rank) in equal pairs, and a zero one at the end where the rank is odd."""
    pairs = torch.randn(d, rank // 2, generator=generator).repeat_interleave(2, dim=1)
    return nn.functional.pad(pairs, (0, rank % 2))


class Reflections(ThinRotation):
    """`W' = W Q` (side "in") or `W' = Q W` (side "out") for the Q of the columns U (d x r), of any length."""

    method = "reflections"

    def __init__(self, U: Tensor, side: Side, inverse: Inverse = "exact") -> None:
        super().__init__()
        self.U = nn.Parameter(U)
        self.side, self.inverse = side, inverse

    def strides(self, site: Site) -> dict[str, float]:
        d, r = self.U.shape
        return {"U": math.sqrt(d * r / 8) / mean_length(self.U)}  # the columns start as long as they are numerous

    @property
    def lengthless(self) -> frozenset[str]:
        return frozenset({"U"})

    def thin(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        U, M = compact_wy(self.U, dtype) if self.inverse == "exact" else rounded(neumann_wy(self.U), dtype)
        # On the output side a rotation R gives Rᵀ W, and here Q W is wanted.
        return (U, M) if self.side == "in" else (M.mT, U.mT)


class HOFTAdapter(TwoSided):
    """Holds V (in x r) and U (out x r)."""

    method = "hoft"
