"""LayerNorm tuning: the norms of the model train, and nothing else.

    y = n(x) ∘ w' + b',   w' (d) and b' (d) start at the norm's own w and b

`targets="norms"` names all of them. A norm without a bias has none afterwards.

Paper: "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning", ICLR 2024, arXiv 2312.11420.
Parameters: 2 d, or d without a bias. Cost: none, for the norms run as they did.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from isotune.adapters.contract import WeightAdapter
from isotune.adapters.settings import Settings
from isotune.sites import NORM, Site


class LNTuning(Settings):
    """y = n(x) ∘ w' + b': the norms alone."""

    name: ClassVar[str] = "ln_tuning"
    kinds: ClassVar[frozenset[str]] = NORM
    learning_rate: ClassVar[float] = 2e-2
    formula: ClassVar[str] = "2 * n_out"
    usual_targets: ClassVar[str] = "norms"
    size_option: ClassVar[str | None] = None
    exempt: ClassVar[dict[str, str]] = {
        "seeds_decide_the_start": "it starts at the norm's own values; nothing is drawn"
    }
    dialect: ClassVar[str] = "isotune.adapters.peft.ln_tuning:LNTuningDialect"

    def build(self, site: Site, generator: torch.Generator) -> LNTuningAdapter:
        b = None if site.bias is None else site.bias.detach().float().cpu().clone()
        return LNTuningAdapter(site.weight[:, 0].float().cpu().clone(), b)

    def shell(self, site: Site) -> LNTuningAdapter:
        b = None if site.bias is None else torch.zeros(site.out_features)
        return LNTuningAdapter(torch.zeros(site.out_features), b)

    def parameter_count(self, site: Site) -> int:
        return site.out_features * (1 if site.bias is None else 2)


class LNTuningAdapter(WeightAdapter):
    """Holds w (d) and, where the norm has one, b (d)."""

    method = "ln_tuning"

    def __init__(self, w: Tensor, b: Tensor | None = None) -> None:
        super().__init__()
        self.w = nn.Parameter(w)
        self.b = None if b is None else nn.Parameter(b)

    def weight(self, W: Tensor) -> Tensor:
        return self.w[:, None].to(W.dtype)

    def bias(self, b: Tensor | None) -> Tensor | None:
        return b if b is None or self.b is None else self.b.to(b.dtype)

    def load_peft_state(self, tensors: dict[str, Tensor], site: Site) -> None:
        if self.b is None and "ln_tuning_layers.bias" in tensors:
            self.b = nn.Parameter(torch.zeros_like(self.w))
        super().load_peft_state(tensors, site)

    def peft_state(self, site: Site) -> dict[str, Tensor]:
        own = {"ln_tuning_layers.weight": self.w.detach()}
        return own if self.b is None else own | {"ln_tuning_layers.bias": self.b.detach()}
