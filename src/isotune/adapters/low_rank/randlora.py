"""RandLoRA: a change of full rank as a sum of frozen random low-rank products with trained scales.

    W' = W + s Σ_j B_j diag(λ_j) A diag(γ_j)     (out x in; transposed where in > out),   n = ⌈m / r⌉ bases,

m and M the smaller and the larger side, B_j (M x r) and A (r x m) frozen, Λ = [λ_1 ... λ_n] (r x n) and
Γ (n x m) with the rows γ_j trained; s = alpha / r. A and the B_j are drawn once for the largest layer, and each
layer takes a part of them. Λ starts at zero.

The authors' code and PEFT flatten B and A in different orders, so that column c of B, of the basis ⌊c / r⌋, meets
row c of A, scaled by λ_j and γ_j of j = c mod n. `legacy_pairing` computes that; files of PEFT's mean nothing else.

Paper: "RandLoRA: Full-rank parameter-efficient fine-tuning of large models", ICLR 2025, arXiv 2502.00987.
Parameters: n (r + m): a larger r has fewer. Cost for one row: 2 m (in + out) flops, about two layers more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from isotune.adapters.contract import LowRank, check_tensors
from isotune.adapters.random_projections import RandomProjections
from isotune.adapters.shared import Shared, largest
from isotune.linalg.random_bases import bfloat_bases, ternary_bases
from isotune.sites import CONVOLUTIONS, LINEAR, Site


class RandLoRA(RandomProjections):
    """W' = W + s Σ_j B_j diag(λ_j) A diag(γ_j): random bases that all layers share, up to full rank."""

    name: ClassVar[str] = "randlora"
    kinds: ClassVar[frozenset[str]] = LINEAR | CONVOLUTIONS
    learning_rate: ClassVar[float] = 1e-3
    formula: ClassVar[str] = "ceil(min(n_in, n_out) / rank) * (rank + min(n_in, n_out))"
    dialect: ClassVar[str] = "isotune.adapters.peft.random_projections:RandLoRADialect"
    exempt: ClassVar[dict[str, str]] = {
        "seeds_decide_the_start": "the random bases are shared and have a seed of their own, an option"
    }

    rank: int = Field(32, gt=0, le=2**16, description="Rank of each basis; the larger, the fewer parameters.")
    alpha: float | None = Field(None, gt=0, description="Scaling numerator; the default is 20 rank.")
    over_root: bool = Field(False, description="Scale by alpha / (rank √n), as the authors' code, not alpha / rank.")
    bases: Literal["uniform", "sparse", "very sparse"] = Field(
        "uniform",
        description="Entries of the bases: uniform; -1, 0 and 1 with 2/3 zero; or with all but 1/√m zero, where a "
        "small rank leaves some inputs (or outputs) unchanged.",
    )
    legacy_pairing: bool = Field(False, description="Pair the bases as the authors' code and PEFT do.")

    @property
    def resolved_alpha(self) -> float:
        """The scaling numerator, with the default filled in."""
        return self.alpha or 20.0 * self.rank

    def _bases_for(self, m: int) -> int:
        return -(-m // self.rank)

    def build(self, site: Site, generator: torch.Generator) -> RandLoRAAdapter:
        sides = site.in_features, site.out_features
        n = self._bases_for(min(sides))
        gamma = torch.full((n, min(sides)), 1 / max(n, min(sides)))
        scale = self.resolved_alpha / self.rank / (math.sqrt(n) if self.over_root else 1)
        return RandLoRAAdapter(torch.zeros(self.rank, n), gamma, *sides, scale, self.legacy_pairing, self.dropout)

    def shared(self, sites: Iterable[Site]) -> dict[str, Tensor]:
        m, M = sorted(largest(sites))
        sizes = M, self._bases_for(m), self.rank, m
        generator = self.generator()
        if self.bases == "uniform":
            A, B = bfloat_bases(*sizes, generator)
        else:
            A, B = ternary_bases(*sizes, 3.0 if self.bases == "sparse" else math.sqrt(m), generator)
        return {"randlora_A": A, "randlora_B": B}

    def parameter_count(self, site: Site) -> int:
        m = min(site.in_features, site.out_features)
        return self._bases_for(m) * (self.rank + m)


class RandLoRAAdapter(LowRank):
    """Holds Lambda (r x n) and gamma (n x m)."""

    method = "randlora"

    def __init__(
        self, Lambda: Tensor, gamma: Tensor, n_in: int, n_out: int, scale: float, legacy: bool, dropout: float = 0.0
    ) -> None:
        super().__init__(dropout)
        self.Lambda, self.gamma = nn.Parameter(Lambda), nn.Parameter(gamma)
        self.n_in, self.n_out = n_in, n_out
        self.scale, self.legacy = scale, legacy

    def share(self, shared: Shared) -> None:
        self.shared = shared
        B, A = self.bases()
        (n, m), M = self.gamma.shape, max(self.n_in, self.n_out)
        r = len(self.Lambda)
        expected: dict[str, tuple[int, ...]] = {"randlora_A": (r, 1, m), "randlora_B": (M, n, r)}
        check_tensors({**shared.tensors(), "randlora_A": A, "randlora_B": B}, expected)

    def bases(self) -> tuple[Tensor, Tensor]:
        """B (M, n, r) and A (r, 1, m), this layer's part of what all share."""
        (n, m), M = self.gamma.shape, max(self.n_in, self.n_out)
        return self.shared["randlora_B"][:M, :n], self.shared["randlora_A"][:, :, :m]

    def change(self) -> tuple[Tensor, Tensor]:
        B, A = self.bases()
        scales = self.scale * self.Lambda
        if self.legacy:
            rows = scales[:, :, None] * A * self.gamma  # (r, n, m)
        else:
            rows = scales.mT[:, :, None] * A[:, 0] * self.gamma[:, None]  # (n, r, m)
        flat_B, flat_A = B.flatten(1), rows.flatten(0, 1)
        return (flat_B, flat_A) if self.n_in <= self.n_out else (flat_A.mT, flat_B.mT)

    def peft_state(self, site: Site) -> dict[str, Tensor]:
        return {"randlora_lambda": self.Lambda.detach(), "randlora_gamma": self.gamma.detach()}
