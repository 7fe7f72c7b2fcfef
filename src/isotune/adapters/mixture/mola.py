"""MoLA, a mixture of LoRAs with more experts in higher layers: a router on each layer gives every token to a few.

    y = W x + b + s Σ_{e in T} w_e B_e A_e x,   p = softmax(R x),   w_e = p_e / Σ_{T} p,   T the k largest

R (E x in) has no bias, s = alpha / r. `experts="2-4-6-8"` gives the lowest fourth of the layers two experts each, and
the highest fourth eight. The balance of a router, where its penalty is on, is

    E Σ_e f_e P_e,   f_e the share of choices that fall on e, P_e the mean of p_e over tokens

which is 1 where all experts are chosen alike. It is taken for each router and then summed, over tokens that are no
padding: `isotune train` says which are, in a loop of one's own `isotune.tokens(model, attention_mask)` before each
batch does. Its gradient reaches the router and not what the router read.

Paper: "Higher Layers Need More LoRA Experts", 2024, arXiv 2402.08562. Parameters: E (r (in + out) + in). Cost for n
rows: 2 n E r (in + out) flops, for all experts run, and those not chosen are weighed by zero. What it adds depends on
the row, so that it folds into no weight; the authors' code returns from such a merge without a word.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from isotune.adapters.low_rank.lora import LoRAAdapter, fresh_factors
from isotune.adapters.mixed import NO_WEIGHT, Mixture, thin_of, weighed_sum
from isotune.adapters.settings import Settings
from isotune.errors import OptionError
from isotune.linalg.random_bases import uniform
from isotune.sites import LINEAR, Site


class MoLA(Settings):
    """y = W x + b + s Σ_e w_e B_e A_e x: LoRAs of which a router gives every token a few."""

    name: ClassVar[str] = "mola"
    kinds: ClassVar[frozenset[str]] = LINEAR
    learning_rate: ClassVar[float] = 1e-2
    formula: ClassVar[str] = "5 * (rank * (n_in + n_out) + n_in)"
    exempt: ClassVar[dict[str, str]] = {
        **NO_WEIGHT,
        "every_factor_moves_within_two_steps": "an expert that no token was given has no gradient",
    }

    rank: int = Field(8, gt=0, description="Rank of each expert.")
    experts: str = Field(
        "5",
        pattern=r"^[1-9]\d*(-[1-9]\d*)*$",
        description="Experts of a layer; or of groups of layers, from the lowest to the highest, such as 2-4-6-8.",
    )
    top_k: int = Field(2, gt=0, description="Experts that each token gets.")
    alpha: float | None = Field(None, gt=0, description="Numerator of the scale s; the default makes s one.")
    balance: float = Field(0.0, ge=0, description="Weight of the penalty on uneven use of experts, at each layer.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the inputs of the experts while training.")

    @field_validator("experts", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        return str(value) if isinstance(value, int) else value

    @property
    def groups(self) -> list[int]:
        """Experts of a layer in each group."""
        return [int(number) for number in self.experts.split("-")]

    def model_post_init(self, _: object) -> None:
        if self.top_k > min(self.groups):
            raise OptionError(f"mola: top_k={self.top_k} experts for each token, and layers with {min(self.groups)}")

    def allot(self, sites: Mapping[str, Site]) -> dict[str, Settings]:
        depths = {path: int(found[1]) if (found := re.search(r"\.(\d+)\.", f".{path}.")) else 0 for path in sites}
        number = max(depths.values(), default=0) + 1
        groups = self.groups
        return {
            path: self.model_copy(update={"experts": str(groups[depth * len(groups) // number])})
            for path, depth in depths.items()
        }

    def build(self, site: Site, generator: torch.Generator) -> MoLAAdapter:
        (count,) = self._count()
        experts = [LoRAAdapter(*fresh_factors(site, self.rank, generator), self.scale) for _ in range(count)]
        return MoLAAdapter(experts, uniform((count, site.in_features), site.in_features**-0.5, generator), self)

    @property
    def scale(self) -> float:
        """The factor s."""
        return (self.alpha or self.rank) / self.rank

    def _count(self) -> list[int]:
        if len(self.groups) > 1:
            raise OptionError(f"mola: experts={self.experts} are groups of layers, and this is one")
        return self.groups

    def parameter_count(self, site: Site) -> int:
        (count,) = self._count()
        return count * (self.rank * (site.in_features + site.out_features) + site.in_features)


class MoLAAdapter(Mixture):
    """Holds the experts' A_e (r x in) and B_e (out x r), and the router's R (E x in)."""

    method = "mola"

    def __init__(self, experts: list[LoRAAdapter], R: Tensor, settings: MoLA) -> None:
        router = nn.utils.skip_init(nn.Linear, R.shape[1], R.shape[0], bias=False)
        router.weight = nn.Parameter(R)
        super().__init__(experts, router)
        self.settings, self.dropout = settings, nn.Dropout(settings.dropout)
        self._read: Tensor | None = None

    def probabilities(self, x: Tensor) -> Tensor:
        """p (..., E) for x (..., in), in fp32 or better."""
        assert self.router is not None
        return self.router(x.to(self.router.weight.dtype)).softmax(-1)  # type: ignore[arg-type]

    def weights(self, x: Tensor, site: Site) -> Tensor:
        p = self.probabilities(x)
        chosen = p.topk(self.settings.top_k, dim=-1)
        kept = torch.zeros_like(p).scatter(-1, chosen.indices, chosen.values)
        return kept / kept.sum(-1, keepdim=True)

    def forward(self, x: Tensor, site: Site) -> Tensor:
        if self.training and self.settings.balance:
            self._read = x.detach()
        y, weights = site(x), self.weights(x, site)
        thin = [thin_of(expert, site) for expert in self.experts]  # type: ignore[arg-type]
        return y + weighed_sum(self.dropout(x).to(y.dtype), thin, weights)

    def penalty(self, site: Site) -> Tensor:
        x, self._read = self._read, None
        if x is None:
            return super().penalty(site)
        x = x.flatten(0, -2)
        if self.tokens is not None and self.tokens.numel() == len(x):
            x = x[self.tokens.flatten().to(x.device, torch.bool)]
        p = self.probabilities(x)
        k, count = self.settings.top_k, p.shape[-1]
        f = torch.zeros_like(p).scatter(-1, p.topk(k, dim=-1).indices, 1.0).mean(0) / k
        return self.settings.balance * count * (f * p.mean(0)).sum()
