"""CorDA, context-oriented decomposition adaptation.

    W' = W + s (B A - B0 A0),   B0 = U_r √(S_r / s),   A0 = √(S_r / s) V̂_rᵀ,   W = U diag(S) V̂ᵀ

with `U diag(S) Vᵀ = W C'` and `V̂ᵀ = Vᵀ C'⁻¹`, where C' is the (damped) covariance of the layer's inputs: PiSSA that
sees W through the data that pass it. Two uses: "ipm", instruction-previewed, trains the r largest components for
data of the task; "kpm", knowledge-preserved, trains the r smallest ones for data whose knowledge is to be kept.

`isotune.calibrate(model, batches)` measures C. Until then C is the identity, which makes "ipm" start as PiSSA does.
The authors divide each sample by its (signed) largest entry before it counts; here every row counts as it is.

Paper: "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for Task-Aware Parameter-Efficient
Fine-tuning", NeurIPS 2024, arXiv 2406.05223. Parameters: r (in + out). Cost for n rows: 4 n r (in + out) flops; at
the start a pass over the data with 2 in² flops a row, one in x in inverse and one SVD.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from isotune.adapters.spectral.principal import Principal, PrincipalSettings, Sizes
from isotune.errors import IsotuneError
from isotune.linalg.triplets import Fuse, context_triplets, fused, singular_triplets
from isotune.sites import CONVOLUTIONS, LINEAR, Site

Mode = Literal["ipm", "kpm"]


class CorDA(PrincipalSettings):
    """W' = W + s (B A - B0 A0): LoRA from the triplets of W that matter most (or least) to given data."""

    dialect: ClassVar[str] = "isotune.adapters.peft.principal:CorDADialect"

    name: ClassVar[str] = "corda"
    # An embedding's inputs are one-hot rows, whose covariance is as large as the vocabulary is wide, squared.
    kinds: ClassVar[frozenset[str]] = LINEAR | CONVOLUTIONS

    mode: Mode = Field(
        "ipm", description="Train the largest components of task data (ipm), or the smallest of data to keep (kpm)."
    )
    sigma_fuse: Fuse = Field("UV", description="Where the singular values go: half to each side, all to B (U), or A.")
    damping: float = Field(0.01, gt=0, le=1, description="Multiple of its mean variance added to the covariance.")

    def shell(self, site: Site) -> CorDAAdapter:
        return CorDAAdapter(self.sizes(site), self.mode == "kpm", self.sigma_fuse, self.damping)


class CorDAAdapter(Principal):
    """Starts at the triplets of W, and again, once the covariance is known, at those of W C'."""

    method: ClassVar[str] = "corda"

    def __init__(self, sizes: Sizes, smallest: bool = False, fuse: Fuse = "UV", damping: float = 0.01) -> None:
        super().__init__(sizes)
        self.smallest, self.fuse, self.damping = smallest, fuse, damping

    def start_from(self, W: Tensor, generator: torch.Generator | None = None) -> None:
        U, S, Vh = singular_triplets(W, self.A.shape[0], self.smallest)
        self.place(*fused(U, S / self.scale, Vh, self.fuse))

    @property
    def wants_covariance(self) -> bool:
        return torch.equal(self.A, self.A0) and torch.equal(self.B, self.B0)

    def calibrate(self, site: Site, covariance: Tensor) -> None:
        if not self.wants_covariance:
            raise IsotuneError(
                "corda: this adapter has been trained, and calibrating it would start it anew; "
                "call isotune.calibrate before training"
            )
        W, r = site.weight, self.A.shape[0]
        U, S, Vh = context_triplets(W, covariance, r, self.smallest, self.damping)
        self.place(*fused(U, S / self.scale, Vh, self.fuse))
