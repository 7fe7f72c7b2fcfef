"""A part of the frozen model as adapters see it: a site.

A site is a light view: it holds the layer and computes with it, and has no state of its own. Each kind is a file
here, and `find` knows them all; a site with an adapter on it (`adapted_site`) is again a site, so adapters stack.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from isotune.bare import bare, bare_forward, own_forward


class Site(ABC):
    """What an adapter may ask of a part of the model. Shapes: x (..., in), y (..., out), W (out, in).

    There are two families: linear maps, `y = x Wᵀ + b`, and `Block`, `y = f(x, ...)`, which has no weight.
    """

    kind: ClassVar[str]
    rotates_input: ClassVar[bool] = False  # rows of x are rows of the linear map, so they can be rotated
    rotates_output: bool = True  # all of y - b comes from one W, so rotating it is rotating W's rows
    called: bool = True  # its module calls the layer, and does not read the weight to compute with it itself
    features: int = -1  # the dimension of y along which its features lie
    packed: bool = False  # the weight is quantised or packed: the forward pass never asks for it

    batch_dimensions: int = 2  # the least that x has where it is a batch

    def __init__(self, layer: nn.Module) -> None:
        self.layer: Any = layer

    @classmethod
    def of(cls, layer: nn.Module) -> bool:
        """Whether the layer is of this kind, and computes what layers of it usually do."""
        return False

    @classmethod
    def hollow(cls, weight: Tensor) -> nn.Module:
        """A layer of this kind that holds `weight`, in the layer's own shape, no bias, and nothing else."""
        raise NotImplementedError(cls.__name__)

    def entry(self) -> dict[str, Any]:
        """What a file's header says of the site."""
        return {"kind": self.kind, "shape": list(self.shape)}

    def __call__(self, x: Tensor) -> Tensor:
        """Run the layer itself: its own forward, without adapters and hooks."""
        return self.run(x) if self.readable else bare_forward(self.layer, x)

    @abstractmethod
    def run(self, x: Tensor) -> Tensor:
        """What the usual forward of this kind makes of x (..., in) with the layer's own parameters: y (..., out)."""

    @property
    def readable(self) -> bool:
        """Whether the layer's forward is the usual one of its kind, so that `run` may stand for it."""
        return own_forward(self.layer) is None

    @property
    def parameter(self) -> Any:
        """The layer's own weight as it holds it."""
        return bare(self.layer, "weight")

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """W as a dense (out, in) view, detached from autograd."""

    @property
    def in_features(self) -> int:
        """Columns of W."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """Rows of W."""
        return self.weight.shape[0]

    @property
    def bias(self) -> Tensor | None:
        """The layer's bias (out), if it has one."""
        return bare(self.layer, "bias")

    @abstractmethod
    def layout(self, W: Tensor) -> Tensor:
        """W (out, in) in the layer's own shape; the inverse of `weight`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the layer's own weight, were it dense."""
        return tuple(self.layout(torch.empty(self.out_features, self.in_features, device="meta")).shape)

    @abstractmethod
    def forward_with(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        """Run the layer on x (..., in) with another W (out, in) and b (out); everything else about it stays."""

    def plain(self, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """W (out, in) and b (out), where running the layer on x (..., in) is `x Wᵀ + b` and nothing else, or None."""
        return None

    def rows(self, x: Tensor) -> int:
        """How many rows of the linear map x stands for: n for x (n, in)."""
        return x.numel() // self.in_features

    def linear(self, x: Tensor) -> Tensor:
        """The layer without its bias: x (..., in) to y (..., out)."""
        y = self(x)
        return y if self.bias is None else y - self.bias.to(y.dtype)

    @abstractmethod
    def project(self, x: Tensor, A: Tensor) -> Tensor:
        """`x Aᵀ` for A (r, in), in the way the layer reads x; z has r features (r for each group of a conv)."""

    def pointwise(self, B: Tensor) -> Tensor:
        """B (out, r) as the weight of a layer of this kind that reads r features, one at a time."""
        return B

    @abstractmethod
    def expand(self, z: Tensor, B: Tensor) -> Tensor:
        """`z Bᵀ` for z from `project` and B (out, r)."""

    def along(self, v: Tensor) -> Tensor:
        """v (out), or (in), with the dimensions that let it meet the features of y, or x."""
        return v[(..., *(None,) * (-1 - self.features))]

    def over_rows(self, y: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply `change` to the rows (..., out) of y."""
        return change(y.movedim(self.features, -1)).movedim(-1, self.features)

    def over_outputs(self, y: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply `change` to the rows (..., out) of `y - b`, then add b again."""
        if self.bias is None:
            return self.over_rows(y, change)
        bias = self.bias.to(y.dtype)
        return self.over_rows(y, lambda rows: change(rows - bias) + bias)
