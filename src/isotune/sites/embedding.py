"""`nn.Embedding`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from isotune.bare import bare_class, bare_forward
from isotune.sites.linear import holding
from isotune.sites.site import Site


class EmbeddingSite(Site):
    """`nn.Embedding`: x holds indices, which stand for one-hot rows, so W is (dimension, number of embeddings)."""

    kind = "embedding"
    batch_dimensions = 1
    readable = False  # a head may be tied to the table, which is not adapted with it

    @classmethod
    def of(cls, layer: nn.Module) -> bool:
        usual = bare_class(layer).forward is nn.Embedding.forward
        return isinstance(layer, nn.Embedding) and usual and layer.max_norm is None

    @classmethod
    def hollow(cls, weight: Tensor) -> nn.Module:
        return holding(weight, nn.Embedding(weight.shape[0], weight.shape[1], device="meta"))

    def run(self, x: Tensor) -> Tensor:
        return bare_forward(self.layer, x)

    @property
    def weight(self) -> Tensor:
        return self.parameter.detach().mT

    def layout(self, W: Tensor) -> Tensor:
        return W.mT.contiguous()

    def forward_with(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return F.embedding(x, W.mT, self.layer.padding_idx)

    def project(self, x: Tensor, A: Tensor) -> Tensor:
        return F.embedding(x, A.mT, self.layer.padding_idx)

    def expand(self, z: Tensor, B: Tensor) -> Tensor:
        return F.linear(z, B.to(z.dtype))
