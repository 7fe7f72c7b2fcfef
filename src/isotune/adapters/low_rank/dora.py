"""DoRA, weight-decomposed low-rank adaptation: LoRA for the direction of every row, a learned number for its length.

    W' = diag(m / g) (W + s B A),   g_i = |w_i + s b_i A|,   m trained, |w_i| at the start

Paper: "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024, arXiv 2402.09353. Parameters: r (in + out) + out.
Cost for n rows: LoRA's 2 n r (in + out) flops, 2 n out to scale the outputs, and 2 in out r a step for g, which needs
no product B A:  g_i² = |w_i|² + s b_i · (2 W Aᵀ + s B A Aᵀ)_i.  At inference m / g is kept between calls.

The paper holds g constant in the backward pass, to save memory: the gradient is then not the derivative of the
output. `detach_norm=False` gives the derivative. Dropout falls on B A only, not on W x.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from isotune.adapters.contract import check_tensors
from isotune.adapters.low_rank.lora import LoRA, LoRAAdapter, fresh_factors
from isotune.adapters.low_rank.row_scaled import RowScaledAdapter
from isotune.linalg.precision import at_least_fp32
from isotune.sites import CONVOLUTIONS, Site


class DoRA(LoRA):
    """W' = diag(m / |W + s B A|) (W + s B A): LoRA, and a learned length for each row of the result."""

    name: ClassVar[str] = "dora"
    learning_rate: ClassVar[float] = 1e-2
    formula: ClassVar[str] = "rank * (n_in + n_out) + n_out"
    dialect: ClassVar[str] = "isotune.adapters.peft.lora:DoRADialect"
    exempt: ClassVar[dict[str, str]] = {
        "gradients_are_derivatives": "as in the paper, g is a constant in the backward pass; it holds with "
        "detach_norm=False, which a test of its own shows"
    }

    detach_norm: bool = Field(
        True, description="Hold the row norms constant in the backward pass, as the paper does."
    )

    def build(self, site: Site, generator: torch.Generator) -> RowScaledAdapter:
        product = LoRAAdapter(*fresh_factors(site, self.rank, generator), self.scale, self.dropout)
        return self.scaled(product, torch.linalg.vector_norm(at_least_fp32(site.weight), dim=1).cpu())

    def adapter(self, A: Tensor, B: Tensor, site: Site) -> RowScaledAdapter:
        return self.scaled(LoRAAdapter(A, B, self.scale, self.dropout), torch.ones(site.out_features))

    def scaled(self, product: LoRAAdapter, norms: Tensor) -> RowScaledAdapter:
        """The adapter of the product s B A on a layer whose rows have these lengths (out)."""
        return DoRAAdapter(product, norms, self.detach_norm)

    def parameter_count(self, site: Site) -> int:
        return super().parameter_count(site) + site.out_features


class DoRAAdapter(RowScaledAdapter):
    """Holds A (r x in), B (out x r) and m (out)."""

    method = "dora"

    def scaling(self, norms: Tensor) -> Tensor:
        return self.magnitude / norms

    def peft_state(self, site: Site) -> dict[str, Tensor]:
        m = self.magnitude.detach()
        return self.product.peft_state(site) | {
            "lora_magnitude_vector": site.pointwise(m[None]) if site.kind in CONVOLUTIONS else m
        }

    def load_peft_state(self, tensors: dict[str, Tensor], site: Site) -> None:
        own = self.peft_state(site)
        check_tensors(tensors, {name: tuple(tensor.shape) for name, tensor in own.items()})
        for name, tensor in own.items():
            tensor.copy_(tensors[name])  # views of A, B and m
