"""Layers whose weight is no dense float tensor: torchao's int8, and stand-ins for other libraries' layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NibbleLinear(nn.Linear):
    """Two 4-bit numbers in each byte of a (out * in / 2, 1) weight, as bitsandbytes keeps them; no way to unpack."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        W = layer.weight.detach()
        self.register_buffer("scale", W.abs().amax(dim=1, keepdim=True) / 7)
        q = (torch.round(W / self.scale) + 8).to(torch.uint8).view(-1, 2)
        self.weight = nn.Parameter(q[:, :1] * 16 + q[:, 1:], requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, unpack(self), self.bias)


class SecretLinear(nn.Linear):
    """Keeps its packed weight elsewhere, and raises when asked for `weight`."""

    def __init__(self, layer: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        packed = NibbleLinear(layer)
        self.register_buffer("scale", packed.scale)
        self.register_buffer("qweight", packed.weight.detach())
        self.bias = layer.bias

    @property
    def weight(self) -> Tensor:
        raise RuntimeError("this layer has no dense weight")

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, unpack(self), self.bias)


def unpack(layer: NibbleLinear | SecretLinear) -> Tensor:
    """The dense weight that a stand-in stands for."""
    q = layer.qweight if isinstance(layer, SecretLinear) else layer.weight
    W = torch.cat([q // 16, q % 16], dim=1).view(layer.out_features, layer.in_features)
    return (W.to(torch.float32) - 8) * layer.scale


def pack(model: nn.Module, kind: type[NibbleLinear] | type[SecretLinear] | str) -> nn.Module:
    """Replace every linear layer of the blocks of stories260K by a packed one, in place."""
    layers = model.model.layers
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(layers, Int8WeightOnlyConfig())
        return model
    for name, module in list(layers.named_modules()):
        if type(module) is nn.Linear:
            parent, _, last = name.rpartition(".")
            setattr(layers.get_submodule(parent), last, kind(module))
    return model
