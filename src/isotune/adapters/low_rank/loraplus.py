"""LoRA+: LoRA whose B learns faster than its A.

    W' = W + s B A,   A trained at the learning rate, B at λ times it

Paper: "LoRA+: Efficient Low Rank Adaptation of Large Models", ICML 2024, arXiv 2402.12354. Parameters and cost are
LoRA's. The factor acts through `Adapter.parameter_groups`, which isotune's trainer asks; on disk it is a LoRA. At an
embedding both factors keep the plain rate: A starts at zero there, not B (the authors give these a rate of 1e-6).
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from isotune.adapters.contract import Adapter, Treatment
from isotune.adapters.low_rank.lora import LoRA, LoRAAdapter
from isotune.sites import Site


class LoRAPlus(LoRA):
    """W' = W + s B A with B learning faster than A: LoRA with two learning rates."""

    name: ClassVar[str] = "loraplus"
    learning_rate: ClassVar[float] = 7e-4

    ratio: float = Field(16.0, gt=0, description="B's learning rate over A's; the paper's lambda.")

    def adapter(self, A: Tensor, B: Tensor, site: Site) -> Adapter:
        return LoRAPlusAdapter(A, B, self.scale, self.dropout, 1.0 if site.kind == "embedding" else self.ratio)


class LoRAPlusAdapter(LoRAAdapter):
    """Holds A (r x in) and B (out x r)."""

    method = "loraplus"

    def __init__(self, A: Tensor, B: Tensor, scale: float = 1.0, dropout: float = 0.0, ratio: float = 16.0) -> None:
        super().__init__(A, B, scale, dropout)
        self.ratio = ratio

    def parameter_groups(self) -> dict[str, Treatment]:
        return {"B": Treatment(rate=self.ratio)}
