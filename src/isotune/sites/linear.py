"""`nn.Linear`, also where its weight is packed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from isotune.bare import bare_class, own_forward
from isotune.quantised import dequantized, is_packed
from isotune.sites.site import Site

_TENSORS = (Tensor, nn.Parameter)  # not a subclass, which may compute in its own way


class LinearSite(Site):
    """`nn.Linear`."""

    kind = "linear"
    rotates_input = True

    @classmethod
    def of(cls, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Linear) and not is_packed(layer)

    @classmethod
    def hollow(cls, weight: Tensor) -> nn.Module:
        return holding(weight, nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta"))

    def run(self, x: Tensor) -> Tensor:
        return F.linear(x, self.parameter, self.bias)

    @property
    def readable(self) -> bool:
        return bare_class(self.layer).forward is nn.Linear.forward and own_forward(self.layer) is None

    @property
    def called(self) -> bool:  # type: ignore[override]
        return not isinstance(self.layer, NonDynamicallyQuantizableLinear)  # of nn.MultiheadAttention

    @property
    def weight(self) -> Tensor:
        return self.parameter.detach()

    @property
    def in_features(self) -> int:
        return self.layer.in_features

    @property
    def out_features(self) -> int:
        return self.layer.out_features

    def plain(self, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
        W, b = self.parameter, self.bias
        if type(W) not in _TENSORS or W.requires_grad or not self.readable or (b is not None and b.requires_grad):
            return None
        if W.dtype == x.dtype and (b is None or b.dtype == x.dtype):
            return self.weight, b
        # Under autocast the layer casts its weight just so; without it, other dtypes are the layer's to refuse.
        if W.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            return None
        return self.weight.to(x.dtype), None if b is None else b.to(x.dtype)

    def linear(self, x: Tensor) -> Tensor:
        plain = self.plain(x)
        return super().linear(x) if plain is None else F.linear(x, plain[0])

    def layout(self, W: Tensor) -> Tensor:
        return W

    def forward_with(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return F.linear(x, W.to(x.dtype), b)

    def project(self, x: Tensor, A: Tensor) -> Tensor:
        return F.linear(x, A.to(x.dtype))

    def expand(self, z: Tensor, B: Tensor) -> Tensor:
        return F.linear(z, B.to(z.dtype))


class PackedLinearSite(LinearSite):
    """`nn.Linear` whose weight is no dense floating-point tensor; `weight` is dequantised anew each time."""

    packed = True

    @classmethod
    def of(cls, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Linear) and is_packed(layer)

    @property
    def weight(self) -> Tensor:
        return dequantized(self.layer)

    def plain(self, x: Tensor) -> None:
        return None


def holding(weight: Tensor, layer: nn.Module) -> nn.Module:
    """The layer with this weight, in the layer's own shape."""
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer
