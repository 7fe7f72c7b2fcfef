"""SORSA, singular values and orthonormal regularised singular vectors adaptation.

    W' = W + s (B diag(σ) A - B0 diag(σ0) A0),   penalty  γ (|A Aᵀ - I|_F + |Bᵀ B - I|_F) / 2

B (out x r), σ (r) and A (r x in) start at the r largest singular triplets of W (not divided by s = alpha / r), are
all trained, and the penalty keeps the singular vectors orthonormal, so that σ stays what its name says.

Paper: "SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation of Large Language Models",
2024, arXiv 2409.00055. Parameters: r (in + out + 1). Cost for n rows: 4 n r (in + out) flops; at the start one SVD.
The authors' code averages the penalty over layers and steps with it apart from the loss, by γ / learning rate and
unclipped; here it is a term of the loss for each layer, like every penalty.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from isotune.adapters.contract import check_tensors
from isotune.adapters.spectral.principal import Principal, PrincipalSettings, Sizes
from isotune.linalg.triplets import orthonormality_error, singular_triplets
from isotune.sites import Site


class SORSA(PrincipalSettings):
    """W' = W + s (B diag(σ) A - B0 diag(σ0) A0): the largest singular triplets, trained and kept orthonormal."""

    name: ClassVar[str] = "sorsa"
    learning_rate: ClassVar[float] = 5e-3
    formula: ClassVar[str] = "rank * (n_in + n_out + 1)"
    dialect: ClassVar[str] = "isotune.adapters.peft.principal:SORSADialect"

    gamma: float = Field(
        0.05,
        ge=0,
        description="Weight of the penalty at each layer; the paper's 4e-4, over its learning rate and 224 layers, "
        "comes to 0.06.",
    )
    squared: bool = Field(False, description="Square the penalty's norms, or not (paper).")

    def shell(self, site: Site) -> SORSAAdapter:
        return SORSAAdapter(self.sizes(site), self.gamma, self.squared)

    def parameter_count(self, site: Site) -> int:
        return self.rank * (site.in_features + site.out_features + 1)


class SORSAAdapter(Principal):
    """Holds σ (r) besides; B0 holds B0 diag(σ0)."""

    method: ClassVar[str] = "sorsa"

    def __init__(self, sizes: Sizes, gamma: float = 0.0, squared: bool = False) -> None:
        super().__init__(sizes)
        self.sigma = nn.Parameter(torch.zeros(sizes.rank))
        self.product_scale = None  # σ stands between B and A
        self.gamma, self.squared = gamma, squared

    def start_from(self, W: Tensor, generator: torch.Generator | None = None) -> None:
        U, S, Vh = singular_triplets(W, self.A.shape[0])
        self.place(U, Vh)
        self.sigma.detach().copy_(S)
        self.B0.copy_(self.left().detach())

    def left(self) -> Tensor:
        return self.B * self.sigma

    def penalty(self, site: Site) -> Tensor:
        if not self.gamma:
            return super().penalty(site)
        errors = [orthonormality_error(V, self.squared) for V in (self.A.mT, self.B)]
        return self.gamma * (errors[0] + errors[1]) / 2

    def peft_state(self, site: Site) -> dict[str, Tensor]:
        # PEFT reads B diag(σ); B and σ are kept beside it, so that training goes on bit for bit.
        return super().peft_state(site) | {"lora_B_trained": self.B.detach(), "lora_sigma": self.sigma.detach()}

    def load_peft_state(self, tensors: dict[str, Tensor], site: Site) -> None:
        own = {"lora_B_trained": self.B, "lora_sigma": self.sigma}
        check_tensors(
            {name: tensor for name, tensor in tensors.items() if name in own},
            {name: tuple(parameter.shape) for name, parameter in own.items()},
        )
        super().load_peft_state({name: tensor for name, tensor in tensors.items() if name not in own}, site)
        for name, parameter in own.items():
            parameter.detach().copy_(tensors[name])
