"""DiffoRA: a LoRA on every layer, of which a search learns which are worth having; the others are given up.

    W' = W + γ s B A,   γ = σ(θ) while it searches, then 1 for the chosen layers and 0 for the others

The first `search` of the training is the search: a while of steps for A and B alone, for with B = 0 nothing tells γ
what it is worth; then one batch for A and B and the next for θ, in turn, so that γ is judged by rows that the factors
did not see just before. The layers with the largest θ are chosen, over the whole model, begin anew, and train as
plain LoRAs; `isotune.compact` takes the others off.

Paper: "DiffoRA: Enabling Parameter-Efficient Fine-Tuning via Differential Module Selection", 2025, arXiv 2502.08905,
of which no code was found: the search is that of first-order differentiable architecture search. Parameters:
r (in + out) + 1, of which the chosen share of layers stays. Cost for n rows: 2 n r (in + out) flops.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from isotune.adapters.contract import LowRank, Parts, Treatment
from isotune.adapters.low_rank.lora import fresh_factors
from isotune.adapters.settings import Settings, by_schedule
from isotune.sites import CONVOLUTIONS, LINEAR, Site

_WARM = 0.3
"""The share of the search that is for A and B alone."""


class DiffoRA(Settings):
    """W' = W + γ s B A: LoRAs on the layers that a search found worth having one."""

    name: ClassVar[str] = "diffora"
    kinds: ClassVar[frozenset[str]] = LINEAR | CONVOLUTIONS
    learning_rate: ClassVar[float] = 1e-2
    formula: ClassVar[str] = "rank * (n_in + n_out) + 1"
    exempt: ClassVar[dict[str, str]] = {
        "every_factor_moves_within_two_steps": "θ trains in the search alone, and there in turn with A and B"
    }

    rank: int = Field(8, gt=0, description="Rank of each LoRA.")
    keep: float = Field(0.5, gt=0, le=1, description="Share of the layers to choose, at least one.")
    search: float = Field(0.2, gt=0, lt=1, description="Share of the training that is the search.")
    alpha: float | None = Field(None, gt=0, description="Numerator of the scale s; the default makes s one.")
    rate: float = Field(1.0, gt=0, description="Factor on the learning rate for θ.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the input of A while training.")

    def build(self, site: Site, generator: torch.Generator) -> DiffoRAAdapter:
        return DiffoRAAdapter(*fresh_factors(site, self.rank, generator), self)

    def parameter_count(self, site: Site) -> int:
        return self.rank * (site.in_features + site.out_features) + 1


class DiffoRAAdapter(LowRank):
    """Holds A (r x in), B (out x r), θ, what was chosen (-1: nothing yet, 0 or 1) and steps since θ trains."""

    method = "diffora"
    parts: Parts = MappingProxyType({"A": "A", "B": "B"})
    chosen: Tensor
    steps: Tensor

    def __init__(self, A: Tensor, B: Tensor, settings: DiffoRA) -> None:
        super().__init__(settings.dropout)
        self.A, self.B, self.theta = nn.Parameter(A), nn.Parameter(B), nn.Parameter(torch.zeros(()))
        self.register_buffer("chosen", torch.tensor(-1.0))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.settings, self.scale = settings, (settings.alpha or settings.rank) / settings.rank
        self.judges = False  # whether this step trains θ, and not A and B
        self.fixed: float | None = None  # the value of `chosen`, for which a forward pass need not ask the device

    def change(self) -> tuple[Tensor, Tensor]:
        if self.fixed is not None:  # θ rests, with a gradient of zero
            return (self.fixed * self.scale + 0 * self.theta) * self.B, self.A
        if self.judges:
            return self.theta.sigmoid() * self.scale * self.B.detach(), self.A.detach()
        searching = self.training and torch.is_grad_enabled()
        theta = self.theta.detach() if searching else self.theta
        return theta.sigmoid() * self.scale * self.B, self.A

    @classmethod
    def after_steps(cls, adapters: Mapping[Self, Site], progress: float) -> Sequence[nn.Parameter]:
        waiting = [adapter for adapter in adapters if adapter.fixed is None]
        anew: list[nn.Parameter] = []
        for adapter in waiting:
            if progress >= _WARM * adapter.settings.search:
                adapter.steps += 1
                adapter._resume()
        for ready in by_schedule(adapter for adapter in waiting if progress >= adapter.settings.search):
            count = max(1, math.ceil(ready[0].settings.keep * len(ready)))
            order = torch.stack([adapter.theta.detach() for adapter in ready]).argsort(descending=True, stable=True)
            for place, index in enumerate(order.tolist()):
                adapter = ready[index]
                adapter.chosen.fill_(float(place < count))
                adapter._resume()
                if progress < 1:  # else nothing follows in which it could train
                    adapter.B.data.zero_()
                anew += [adapter.A, adapter.B, adapter.theta]
        return anew

    def _resume(self) -> None:
        """Be where the stored numbers say."""
        self.fixed = float(self.chosen) if float(self.chosen) >= 0 else None
        self.judges = self.fixed is None and int(self.steps) % 2 == 1

    def load_peft_state(self, tensors: dict[str, Tensor], site: Site) -> None:
        super().load_peft_state(tensors, site)
        self._resume()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._resume()

    def parameter_groups(self) -> dict[str, Treatment]:
        return {"theta": Treatment(rate=self.settings.rate, decay=0.0)}
