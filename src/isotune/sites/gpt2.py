"""GPT-2's `Conv1D`, which is a linear layer and no convolution."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from isotune.bare import bare_class, own_forward
from isotune.sites.linear import LinearSite, holding


class GPT2Conv1DSite(LinearSite):
    """GPT-2's `Conv1D`: a linear layer that keeps its weight as (in, out)."""

    kind = "gpt2_conv1d"

    @classmethod
    def of(cls, layer: nn.Module) -> bool:
        # By name, so that importing isotune does not import transformers' model code.
        return bare_class(layer).__name__ == "Conv1D" and hasattr(layer, "nf")

    @classmethod
    def hollow(cls, weight: Tensor) -> nn.Module:
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            layer = Conv1D(weight.shape[1], weight.shape[0])
        layer.register_parameter("bias", None)  # it is never made without one
        return holding(weight, layer)

    @property
    def weight(self) -> Tensor:
        return self.parameter.detach().mT

    @property
    def in_features(self) -> int:
        return self.parameter.shape[0]

    @property
    def out_features(self) -> int:
        return self.parameter.shape[1]

    @property
    def readable(self) -> bool:
        return own_forward(self.layer) is None

    def run(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return x @ self.parameter
        y = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.parameter)
        return y.view(*x.shape[:-1], y.shape[-1])

    def layout(self, W: Tensor) -> Tensor:
        return W.mT.contiguous()
