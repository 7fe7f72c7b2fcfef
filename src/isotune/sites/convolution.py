"""`nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d`."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from isotune.bare import bare_class
from isotune.sites.linear import holding
from isotune.sites.site import Site


class ConvolutionSite(Site):
    """A convolution of n dimensions: x (batch, channels, *n), W (out, in / groups * kernel).

    Every group sees the same columns of W.
    """

    usual: ClassVar[type[nn.Module]]
    dimensions: ClassVar[int]
    convolve: ClassVar[Any]

    @classmethod
    def of(cls, layer: nn.Module) -> bool:
        return isinstance(layer, cls.usual) and bare_class(layer).forward is cls.usual.forward

    @classmethod
    def hollow(cls, weight: Tensor) -> nn.Module:
        out, n_in, *kernel = weight.shape
        return holding(weight, cls.usual(n_in, out, tuple(kernel), bias=False, device="meta"))

    @property
    def rotates_output(self) -> bool:  # type: ignore[override]
        # The groups see different inputs: their outputs must not be mixed.
        return self.layer.groups == 1

    def run(self, x: Tensor) -> Tensor:
        return self.layer._conv_forward(x, self.parameter, self.bias)

    @property
    def weight(self) -> Tensor:
        return self.parameter.detach().flatten(1)

    def layout(self, W: Tensor) -> Tensor:
        return W.reshape(-1, *self.parameter.shape[1:])

    def rows(self, x: Tensor) -> int:
        batch = x.shape[0] if x.dim() == self.batch_dimensions else 1
        return batch * math.prod(x.shape[-self.dimensions :]) // math.prod(self.layer.stride)

    def forward_with(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return self.layer._conv_forward(x, self.layout(W).to(x.dtype), b)

    def project(self, x: Tensor, A: Tensor) -> Tensor:
        kernels = self.layout(A).repeat(self.layer.groups, *(1,) * (1 + self.dimensions))
        return self.layer._conv_forward(x, kernels.to(x.dtype), None)

    def pointwise(self, B: Tensor) -> Tensor:
        return B[(..., *(None,) * self.dimensions)]

    def expand(self, z: Tensor, B: Tensor) -> Tensor:
        return type(self).convolve(z, self.pointwise(B).to(z.dtype), groups=self.layer.groups)


class Conv1dSite(ConvolutionSite):
    """`nn.Conv1d`: x (batch, channels, length)."""

    kind, usual, dimensions, convolve = "conv1d", nn.Conv1d, 1, staticmethod(F.conv1d)
    features, batch_dimensions = -2, 3


class Conv2dSite(ConvolutionSite):
    """`nn.Conv2d`: x (batch, channels, h, w)."""

    kind, usual, dimensions, convolve = "conv2d", nn.Conv2d, 2, staticmethod(F.conv2d)
    features, batch_dimensions = -3, 4


class Conv3dSite(ConvolutionSite):
    """`nn.Conv3d`: x (batch, channels, d, h, w)."""

    kind, usual, dimensions, convolve = "conv3d", nn.Conv3d, 3, staticmethod(F.conv3d)
    features, batch_dimensions = -4, 5
