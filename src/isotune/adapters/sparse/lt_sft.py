"""LT-SFT, lottery-ticket sparse fine-tuning: train all, keep the places that moved most, and train those from anew.

    W' = W + D ∘ M,   M all ones in the first phase; then the K largest |D| of all layers, and D = 0 again

`rank` says how many stay: as many in all as LoRAs of this rank would have. Entries that are not chosen are zero and
stay so, under momentum and weight decay too, and the optimizer starts anew with the second phase where it is known
(`isotune.after_step(model, progress, optimizer)`; `isotune train` does). Without a second phase the K largest are
kept as they are. What is stored is their values and places; changes for a language and for a task add up where both
are used: `isotune.use(model, "language", "task")`.

Paper: "Composable Sparse Fine-Tuning for Cross-Lingual Transfer", ACL 2022, arXiv 2110.07560. Parameters: in x out
while training, of which r (in + out) stay. Cost: that of full fine-tuning of these layers. The paper chooses its K in
several rounds if asked; here it is one. The authors' code masks gradients alone, so that weight decay moves the rest,
and subtracts to revert, which leaves the last bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from isotune.adapters.contract import WeightAdapter, check_tensors
from isotune.adapters.settings import Settings
from isotune.linalg.sparse import largest_of_all
from isotune.sites import CONVOLUTIONS, LINEAR, Site


class LTSFT(Settings):
    """W' = W + D ∘ M: the entries that moved most in a first phase, trained from anew in a second."""

    name: ClassVar[str] = "lt_sft"
    kinds: ClassVar[frozenset[str]] = LINEAR | CONVOLUTIONS
    learning_rate: ClassVar[float] = 1e-3
    formula: ClassVar[str] = "n_in * n_out"
    exempt: ClassVar[dict[str, str]] = {"seeds_decide_the_start": "D starts at zero; nothing is drawn"}

    rank: int = Field(8, gt=0, description="As many entries stay, of all layers, as LoRAs of this rank have.")
    dense: float = Field(0.5, gt=0, lt=1, description="Share of the training that is the first phase.")
    l1: float = Field(0.0, ge=0, description="Weight of a penalty on the mean of |D|, at each layer.")

    def build(self, site: Site, generator: torch.Generator) -> LTSFTAdapter:
        D = torch.zeros(site.out_features, site.in_features)
        return LTSFTAdapter(D, min(self.kept_count(site), D.numel()), self.dense, self.l1)

    def parameter_count(self, site: Site) -> int:
        return site.in_features * site.out_features

    def kept_count(self, site: Site) -> int:
        return self.rank * (site.in_features + site.out_features)


class LTSFTAdapter(WeightAdapter):
    """Holds D (out x in), M (out x in) and whether M is chosen."""

    method = "lt_sft"
    memory = frozenset({"mask", "chosen"})
    mask: Tensor
    chosen: Tensor

    def __init__(self, D: Tensor, count: int, dense: float = 0.5, l1: float = 0.0) -> None:
        super().__init__()
        self.D = nn.Parameter(D)
        self.register_buffer("mask", torch.ones(D.shape, dtype=torch.bool))
        self.register_buffer("chosen", torch.zeros((), dtype=torch.bool))
        self.count, self.dense, self.l1 = count, dense, l1

    def weight(self, W: Tensor) -> Tensor:
        return W + (self.D * self.mask).to(W.dtype)

    def penalty(self, site: Site) -> Tensor:
        return self.l1 * self.D.abs().mean()

    @classmethod
    def after_steps(cls, adapters: Mapping[Self, Site], progress: float) -> Sequence[nn.Parameter]:
        waiting = [a for a in adapters if progress >= a.dense and not a.chosen]
        if waiting:
            masks = largest_of_all([a.D.abs() for a in waiting], sum(a.count for a in waiting))
            for adapter, mask in zip(waiting, masks, strict=True):
                adapter.mask.copy_(mask)
                adapter.chosen.fill_(True)
                if progress < 1:  # else no phase follows, in which they could come back
                    adapter.D.data.zero_()
        for adapter in adapters:
            adapter.D.data.mul_(adapter.mask)
        return [adapter.D for adapter in waiting]

    def peft_state(self, site: Site) -> dict[str, Tensor]:
        places = self.D.detach().nonzero()
        return {"lt_sft_places": places.int(), "lt_sft_values": self.D.detach()[*places.mT]}

    def load_peft_state(self, tensors: dict[str, Tensor], site: Site) -> None:
        k = len(tensors.get("lt_sft_values", ()))
        check_tensors(tensors, {"lt_sft_places": (k, 2), "lt_sft_values": (k,)})
        rows, cols = tensors["lt_sft_places"].long().mT
        if k and not (0 <= int(rows.min()) <= int(rows.max()) < len(self.D) and int(cols.min()) >= 0):
            raise ValueError(f"lt_sft_places has places outside of {tuple(self.D.shape)}")
        if k and int(cols.max()) >= self.D.shape[1]:
            raise ValueError(f"lt_sft_places has places outside of {tuple(self.D.shape)}")
        self.D.detach().zero_()[rows, cols] = tensors["lt_sft_values"].to(self.D)
        self.mask.copy_(self.D.detach() != 0)
        self.chosen.fill_(True)
