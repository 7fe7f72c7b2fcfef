"""PiSSA, principal singular values and singular vectors adaptation.

    W' = W + s (B A - B0 A0),   B0 = U_r √(S_r / s),   A0 = √(S_r / s) V_rᵀ,   W = U diag(S) Vᵀ

LoRA that starts at the r largest singular triplets of W: the part that carries most of W is trained, and what is
left stays. U_r, S_r and V_r come from a full SVD, or from a randomised one of `niter` power iterations.

Paper: "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models", NeurIPS 2024,
arXiv 2404.02948. Parameters: r (in + out). Cost for n rows: 4 n r (in + out) flops; at the start one SVD of W,
about 4 out in r (niter + 1) flops when randomised.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from isotune.adapters.spectral.principal import PrincipalOfPEFT, PrincipalSettings, Sizes
from isotune.linalg.triplets import fused, random_triplets, singular_triplets
from isotune.sites import Site


class PiSSA(PrincipalSettings):
    """W' = W + s (B A - B0 A0): LoRA from the largest singular triplets of W."""

    dialect: ClassVar[str] = "isotune.adapters.peft.principal:PiSSADialect"

    name: ClassVar[str] = "pissa"

    niter: int | None = Field(
        None, ge=0, description="Power iterations of a randomised SVD, 16 is nearly exact; none: the full SVD."
    )

    def shell(self, site: Site) -> PiSSAAdapter:
        return PiSSAAdapter(self.sizes(site), self.niter)


class PiSSAAdapter(PrincipalOfPEFT):
    """Starts at the largest singular triplets."""

    method: ClassVar[str] = "pissa"

    def __init__(self, sizes: Sizes, niter: int | None = None) -> None:
        super().__init__(sizes)
        self.niter = niter

    def start_from(self, W: Tensor, generator: torch.Generator | None = None) -> None:
        r = self.A.shape[0]
        if self.niter is None:
            U, S, Vh = singular_triplets(W, r)
        else:
            U, S, Vh = random_triplets(W, r, self.niter, generator or torch.Generator())
        self.place(*fused(U, S / self.scale, Vh))
