"""BitFit: the biases of the model train, and nothing else.

    b' = b + β,   β (out) = 0 at the start

`targets="biased"` names all linear layers and norms of the repeated blocks that have a bias. A model without biases,
such as Llama, has nothing for it.

Paper: "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models", ACL 2022,
arXiv 2106.10199. Parameters: out. Cost for n rows: n out flops; none once it is folded.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from isotune.adapters.contract import WeightAdapter
from isotune.adapters.settings import Settings
from isotune.errors import OptionError
from isotune.sites import CONVOLUTIONS, LINEAR, NORM, Site


class BitFit(Settings):
    """b' = b + β: the biases alone."""

    name: ClassVar[str] = "bitfit"
    kinds: ClassVar[frozenset[str]] = LINEAR | CONVOLUTIONS | NORM
    learning_rate: ClassVar[float] = 5e-3
    formula: ClassVar[str] = "n_out"
    usual_targets: ClassVar[str] = "biased"
    size_option: ClassVar[str | None] = None
    exempt: ClassVar[dict[str, str]] = {"seeds_decide_the_start": "β starts at zero; nothing is drawn"}

    def build(self, site: Site, generator: torch.Generator) -> BitFitAdapter:
        if site.bias is None:
            raise OptionError(
                "the layer has no bias to train; name layers that have one, as targets='biased' does, or leave this "
                "one out, with exclude=..."
            )
        return BitFitAdapter(torch.zeros(site.out_features))

    def shell(self, site: Site) -> BitFitAdapter:
        return BitFitAdapter(torch.zeros(site.out_features))

    def parameter_count(self, site: Site) -> int:
        return site.out_features


class BitFitAdapter(WeightAdapter):
    """Holds β (out), as `bias_change`."""

    method = "bitfit"

    def __init__(self, change: Tensor) -> None:
        super().__init__()
        self.bias_change = nn.Parameter(change)

    def forward(self, x: Tensor, site: Site) -> Tensor:
        y = site(x)
        return y + site.along(self.bias_change.to(y.dtype))

    def weight(self, W: Tensor) -> Tensor:
        return W

    def bias(self, b: Tensor | None) -> Tensor:
        return self.bias_change if b is None else (b + self.bias_change).to(b.dtype)
