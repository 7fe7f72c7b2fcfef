"""SODA, spectral orthogonal decomposition adaptation: singular values shifted, the input turned by a small rotation.

    W' = U diag(relu(S + δ)) Vᵀ Qᵀ,   W = U diag(S) Vᵀ,   Q = Q_1 ⊗ Q_2 ⊗ Q_3,   Q_i = (I + K_i)(I - K_i)⁻¹

so that `y = W x' + U diag(relu(S + δ) - S) Vᵀ x'` for rows `x' = x Q`. δ (k = min(in, out), or the `rank` largest)
and K_i, skew-symmetric c_i x c_i with in = c_1 c_2 c_3, are trained from zero. U and Vᵀ, k (in + out) numbers, are
kept in memory and found anew on load; a smaller `rank` keeps fewer. The authors keep Q_i orthogonal by an optimizer
of their own, here the Cayley transform does; their δ starts at 1e-3, which changes the model at once.

Paper: "Spectrum-Aware Parameter Efficient Fine-Tuning for Diffusion Models", 2024, arXiv 2405.21050. Parameters:
k + Σ c_i (c_i - 1) / 2. Cost for n rows: 2 n in (c_1 + c_2 + c_3) + 2 n k (in + out) flops; the start takes an SVD.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from isotune.adapters.contract import WeightAdapter
from isotune.adapters.settings import Settings, check_rank
from isotune.adapters.thin_layer import beside
from isotune.errors import OptionError
from isotune.kernels.rotation import rotation
from isotune.linalg.cayley import above_diagonal
from isotune.linalg.kronecker import balanced_factors, rotate_kronecker
from isotune.linalg.precision import autocast
from isotune.linalg.triplets import principal_directions
from isotune.sites import CONVOLUTIONS, LINEAR, Site


class SODA(Settings):
    """W' = U diag(relu(S + δ)) Vᵀ (Q_1 ⊗ Q_2 ⊗ Q_3)ᵀ: shifted singular values and a Kronecker-structured rotation."""

    name: ClassVar[str] = "soda"
    kinds: ClassVar[frozenset[str]] = LINEAR | CONVOLUTIONS
    learning_rate: ClassVar[float] = 3e-3
    formula: ClassVar[str] = "min(n_in, n_out) + c * (c - 1) / 2 for each of three balanced factors c of n_in"
    exempt: ClassVar[dict[str, str]] = {
        "seeds_decide_the_start": "it starts from W's SVD; nothing is drawn",
        "parameter_count_is_as_declared": "the factors of n_in are no formula; tests/adapters/test_soda.py counts",
    }

    rank: int | None = Field(None, gt=0, description="Shift this many of the largest singular values; default all.")
    factors: tuple[int, ...] | None = Field(
        None, description="Sizes of the Kronecker factors, whose product is the layer's input; default balanced ones."
    )
    count: int = Field(3, gt=0, le=6, description="How many balanced factors, where the input has so many.")
    delta: float = Field(0.0, ge=0, description="Start of the shift; above 0 it changes the model at once.")

    @property
    def identity_at_start(self) -> bool:
        return self.delta == 0

    def sizes(self, n_in: int) -> tuple[int, ...]:
        """The sizes of the Kronecker factors. Raises OptionError where those asked for do not fit."""
        if self.factors is None:
            return balanced_factors(n_in, self.count)
        if min(self.factors, default=0) < 1 or math.prod(self.factors) != n_in:
            raise OptionError(
                f"factors={self.factors} do not multiply to the layer's input of {n_in}; use for instance "
                f"{balanced_factors(n_in, self.count)}, or leave them out"
            )
        return self.factors

    def build(self, site: Site, generator: torch.Generator) -> SODAAdapter:
        sizes = self.sizes(site.in_features)
        k = min(site.in_features, site.out_features)
        check_rank(self.rank or k, k, "its smaller side")
        U, S, Vh = principal_directions(site.weight, self.rank or k)
        return SODAAdapter(U, S, Vh, sizes, torch.full((self.rank or k,), self.delta))

    def parameter_count(self, site: Site) -> int:
        return (self.rank or min(site.in_features, site.out_features)) + sum(
            map(above_diagonal, self.sizes(site.in_features))
        )


class SODAAdapter(WeightAdapter):
    """Holds δ (k), K, the numbers above the diagonals of all factors in one row, and, frozen, U, S and Vᵀ."""

    method = "soda"
    U: Tensor
    S: Tensor
    Vh: Tensor

    def __init__(self, U: Tensor, S: Tensor, Vh: Tensor, sizes: tuple[int, ...], delta: Tensor) -> None:
        super().__init__()
        for name, tensor in (("U", U), ("S", S), ("Vh", Vh)):
            # W has them, whatever their signs: no file needs to.
            self.register_buffer(name, tensor.contiguous(), persistent=False)
        self.sizes = sizes
        self.delta = nn.Parameter(delta)
        self.K = nn.Parameter(torch.zeros(sum(map(above_diagonal, sizes))))

    def strides(self, site: Site) -> dict[str, float]:
        return {"K": math.sqrt(math.prod(self.sizes) * sum(c - 1 for c in self.sizes) / (384 * 19))}

    def rotations(self) -> list[Tensor]:
        """Q_1, Q_2, ... (c_i, c_i), in fp32 or better."""
        parts = self.K.split([above_diagonal(c) for c in self.sizes])
        return [rotation(part, c) for part, c in zip(parts, self.sizes, strict=True)]

    def _shift(self) -> Tensor:
        """`U diag(relu(S + δ) - S)` (out, k)."""
        return self.U * (torch.relu(self.S + self.delta) - self.S)

    def forward(self, x: Tensor, site: Site) -> Tensor:
        if not site.rotates_input:
            return super().forward(x, site)
        return beside(site, rotate_kronecker(autocast(x), self.rotations()), self.Vh.mT, self._shift().mT)

    def weight(self, W: Tensor) -> Tensor:
        shifted = W + self._shift().to(W.dtype) @ self.Vh.to(W.dtype)
        return rotate_kronecker(shifted, self.rotations(), transpose=True)
