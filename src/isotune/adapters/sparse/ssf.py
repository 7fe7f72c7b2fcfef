"""SSF, scaling and shifting features: every output of a layer scaled and shifted by learned numbers.

    y' = γ ∘ y + β,   W' = diag(γ) W,   b' = γ ∘ b + β

γ starts at one and β at zero; the authors' code draws both around there. A layer without a bias has no β, so that
what is folded is a layer of the same kind.

A model of several modalities of which some may be missing has one such set for each set of those that are there, the
base alone for all of them: adapters by name, of which `isotune.use` takes the one that a batch needs or, with
`rows=[...]`, one for each row.

Papers: "Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning", NeurIPS 2022, arXiv 2210.08823;
"Robust Multimodal Learning with Missing Modalities via Parameter-Efficient Adaptation", 2023, arXiv 2310.03986.
Parameters: 2 out, or out without a bias. Cost for n rows: 2 n out flops, and none once it is folded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from isotune.adapters.contract import WeightAdapter
from isotune.adapters.mixed import ByRow
from isotune.adapters.settings import Settings
from isotune.sites import CONVOLUTIONS, LINEAR, NORM, Site


class SSF(Settings):
    """y' = γ ∘ y + β: every output scaled and shifted."""

    name: ClassVar[str] = "ssf"
    kinds: ClassVar[frozenset[str]] = LINEAR | CONVOLUTIONS | NORM
    learning_rate: ClassVar[float] = 2e-2
    formula: ClassVar[str] = "2 * n_out"
    size_option: ClassVar[str | None] = None
    exempt: ClassVar[dict[str, str]] = {"seeds_decide_the_start": "γ starts at one, β at zero; nothing is drawn"}

    def build(self, site: Site, generator: torch.Generator) -> SSFAdapter:
        b = None if site.bias is None else torch.zeros(site.out_features)
        return SSFAdapter(torch.ones(site.out_features), b)

    def parameter_count(self, site: Site) -> int:
        return site.out_features * (1 if site.bias is None else 2)


class SSFAdapter(WeightAdapter, ByRow):
    """Holds γ (out) and, where the layer has a bias, β (out)."""

    method = "ssf"

    def __init__(self, gamma: Tensor, beta: Tensor | None) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(gamma), None if beta is None else nn.Parameter(beta)

    def forward(self, x: Tensor, site: Site) -> Tensor:
        y = site(x)
        # As y + (γ - 1) y: half precision holds γ, a number close to one, too coarsely.
        y = torch.addcmul(y, y, site.along((self.gamma - 1).to(y.dtype)))
        return y if self.beta is None else y + site.along(self.beta.to(y.dtype))

    @classmethod
    def by_row(cls, adapters: Sequence[Self], y: Tensor, site: Site, weights: Tensor) -> Tensor:
        excess, weights = torch.stack([adapter.gamma - 1 for adapter in adapters]), weights.to(y.dtype)
        y = torch.addcmul(y, y, _beside(weights @ excess.to(y.dtype), y, site))
        shifts: list[Tensor] = [adapter.beta for adapter in adapters if adapter.beta is not None]
        return y if not shifts else y + _beside(weights @ torch.stack(shifts).to(y.dtype), y, site)

    def weight(self, W: Tensor) -> Tensor:
        return (W * self.gamma[:, None]).to(W.dtype)

    def bias(self, b: Tensor | None) -> Tensor | None:
        return b if b is None or self.beta is None else (b * self.gamma + self.beta).to(b.dtype)

    def load_peft_state(self, tensors: dict[str, Tensor], site: Site) -> None:
        if self.beta is None and "ssf_beta" in tensors:  # a layer that only stands for the one that has a bias
            self.beta = nn.Parameter(torch.zeros_like(self.gamma))
        super().load_peft_state(tensors, site)


def _beside(v: Tensor, y: Tensor, site: Site) -> Tensor:
    """v (b, out) with the dimensions that let it meet y (b, ...), whose features lie where the site has them."""
    shape = [len(v), *(1,) * (y.dim() - 1)]
    shape[site.features] = v.shape[1]
    return v.view(shape)
