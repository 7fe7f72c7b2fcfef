"""Normalisations over the last dimension: `nn.LayerNorm`, `nn.RMSNorm`, and those of models, such as Llama's."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from isotune.bare import bare, bare_class, bare_forward, own_forward
from isotune.errors import NoWeightError
from isotune.sites.linear import holding
from isotune.sites.site import Site


class NormSite(Site):
    """`y = n(x) ∘ w + b`, with w (d) seen as W (d, 1). Other forms, such as 1 + w, are the layer's own affair."""

    kind = "norm"

    @classmethod
    def of(cls, layer: nn.Module) -> bool:
        weight: Any = layer._parameters.get("weight")
        name = bare_class(layer).__name__
        known = isinstance(layer, (nn.LayerNorm, nn.RMSNorm)) or name.endswith(("RMSNorm", "LayerNorm"))
        return known and weight is not None and weight.dim() == 1

    @classmethod
    def hollow(cls, weight: Tensor) -> nn.Module:
        return holding(weight, nn.LayerNorm(len(weight), bias=False, device="meta"))

    @property
    def readable(self) -> bool:
        usual = bare_class(self.layer).forward in (nn.LayerNorm.forward, nn.RMSNorm.forward)
        return usual and own_forward(self.layer) is None

    def run(self, x: Tensor) -> Tensor:
        return self._with(x, self.parameter, self.bias)

    def _with(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """The layer's output for x (..., d) with w (d) and b (d)."""
        layer = self.layer
        if isinstance(layer, nn.LayerNorm) and self.readable:
            return F.layer_norm(x, layer.normalized_shape, w, b, layer.eps)
        if self.readable:
            return F.rms_norm(x, layer.normalized_shape, w, layer.eps)
        own = layer._parameters
        kept = own["weight"], own.get("bias")
        try:
            own["weight"] = w
            if kept[1] is not None:
                own["bias"] = b
            return bare_forward(layer, x)
        finally:
            own["weight"] = kept[0]
            if kept[1] is not None:
                own["bias"] = kept[1]

    @property
    def weight(self) -> Tensor:
        return self.parameter.detach()[:, None]

    @property
    def bias(self) -> Tensor | None:
        return bare(self.layer, "bias") if "bias" in self.layer._parameters else None

    @property
    def out_features(self) -> int:
        return self.parameter.shape[0]

    @property
    def in_features(self) -> int:
        return 1

    def layout(self, W: Tensor) -> Tensor:
        return W[:, 0]

    def forward_with(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return self._with(x, W[:, 0], b)

    def rows(self, x: Tensor) -> int:
        return x.numel() // self.out_features

    def project(self, x: Tensor, A: Tensor) -> Tensor:
        raise self._no_map()

    def expand(self, z: Tensor, B: Tensor) -> Tensor:
        raise self._no_map()

    def _no_map(self) -> NoWeightError:
        return NoWeightError(f"a {bare_class(self.layer).__name__} scales what it reads, and is no linear map of it")
