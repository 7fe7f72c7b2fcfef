"""A frozen layer seen as the linear map `y = x Wᵀ + b`, with W of shape (out, in): a site.

A site is a light view: it holds the layer and computes with it, and has no state of its own. `site_of` knows
the layer kinds; a site with an adapter on it (`adapted_site`) is again a site, so adapters stack.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from isotune.bare import bare, bare_class, bare_forward, own_forward
from isotune.errors import NoWeightError, OptionError, TargetError
from isotune.matrix import Matrix
from isotune.packed import dequantized, is_packed


class Site(ABC):
    """What an adapter may ask of a layer. Shapes: x (..., in), y (..., out), W (out, in), unless a kind says else."""

    kind: ClassVar[str]
    rotates_input: ClassVar[bool] = False  # rows of x are rows of the linear map, so they can be rotated
    rotates_output: bool = True  # all of y - b comes from one W, so rotating it is rotating W's rows
    called: bool = True  # the layer's module calls it, and does not read its weight to compute with it itself
    features: int = -1  # the dimension of y along which its features lie
    packed: bool = False  # the weight is quantised or packed: the forward pass never asks for it

    def __init__(self, layer: nn.Module) -> None:
        self.layer: Any = layer

    def __call__(self, x: Tensor) -> Tensor:
        """Run the layer itself: its own forward, without adapters and hooks."""
        return self.run(x) if self.readable else bare_forward(self.layer, x)

    @abstractmethod
    def run(self, x: Tensor) -> Tensor:
        """What the usual forward of this kind computes, of the layer's own parameters."""

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
        """Run the layer with another dense weight and bias; everything else about it stays."""

    def plain(self, x: Tensor) -> tuple[Tensor, Tensor | None] | None:
        """W and b where running the layer on x is `x Wᵀ + b` with these constants and nothing else, or None."""
        return None

    def rows(self, x: Tensor) -> int:
        """How many rows of the linear map x stands for."""
        return x.numel() // self.in_features

    def linear(self, x: Tensor) -> Tensor:
        """The layer without its bias."""
        y = self(x)
        return y if self.bias is None else y - self.bias.to(y.dtype)

    @abstractmethod
    def project(self, x: Tensor, A: Tensor) -> Tensor:
        """`x Aᵀ` for A (r, in), in the way the layer reads x; z has r features (r for each group of a conv)."""

    @abstractmethod
    def expand(self, z: Tensor, B: Tensor) -> Tensor:
        """`z Bᵀ` for z from `project` and B (out, r)."""

    def over_rows(self, y: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply `change` to the rows (..., out) of y."""
        return change(y.movedim(self.features, -1)).movedim(-1, self.features)

    def over_outputs(self, y: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply `change` to the rows (..., out) of `y - b`, then add b again."""
        if self.bias is None:
            return self.over_rows(y, change)
        bias = self.bias.to(y.dtype)
        return self.over_rows(y, lambda rows: change(rows - bias) + bias)


class LinearSite(Site):
    """`nn.Linear`."""

    kind = "linear"
    rotates_input = True

    def run(self, x: Tensor) -> Tensor:
        return F.linear(x, self.parameter, self.bias)

    @property
    def readable(self) -> bool:
        return bare_class(self.layer).forward is nn.Linear.forward and super().readable

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
        frozen = type(W) in _TENSORS and not W.requires_grad and (b is None or not b.requires_grad)
        # Under autocast the layer casts its weight just so; without it, other dtypes are the layer's to refuse.
        same = W.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)
        if not (frozen and same and self.readable):
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

    @property
    def weight(self) -> Tensor:
        return dequantized(self.layer)

    def plain(self, x: Tensor) -> None:
        return None


class Conv1DSite(LinearSite):
    """GPT-2's `Conv1D`: a linear layer that keeps its weight as (in, out)."""

    kind = "conv1d"

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


class Conv2dSite(Site):
    """`nn.Conv2d`: x (batch, channels, h, w), W (out, in / groups * kh * kw); every group sees the same columns."""

    kind = "conv2d"
    features = -3

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
        batch = x.shape[0] if x.dim() == 4 else 1
        return batch * math.prod(x.shape[-2:]) // math.prod(self.layer.stride)

    def forward_with(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return self.layer._conv_forward(x, self.layout(W).to(x.dtype), b)

    def project(self, x: Tensor, A: Tensor) -> Tensor:
        kernels = self.layout(A).repeat(self.layer.groups, 1, 1, 1)
        return self.layer._conv_forward(x, kernels.to(x.dtype), None)

    def expand(self, z: Tensor, B: Tensor) -> Tensor:
        return F.conv2d(z, B[:, :, None, None].to(z.dtype), groups=self.layer.groups)


class EmbeddingSite(Site):
    """`nn.Embedding`: x holds indices, which stand for one-hot rows, so W is (dimension, number of embeddings)."""

    kind = "embedding"
    readable = False  # a head may be tied to the table, which is not adapted with it

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


class Block(Site):
    """`y = f(x, ...)`: a module without a weight of its own, as a whole. Of several outputs the first tensor counts.

    x (..., in) and y (..., out): in is what the first weight in the module reads, out what the last one gives.
    """

    kind = "block"
    readable = False

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return bare_forward(self.layer, x, *args, **kwargs)

    @property
    def in_features(self) -> int:
        return self._sizes()[0]

    @property
    def out_features(self) -> int:
        return self._sizes()[1]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.out_features, self.in_features

    @property
    def bias(self) -> None:
        return None

    def _sizes(self) -> tuple[int, int]:
        inside = [module for name, module in self.layer.named_modules() if "isotune" not in name.split(".")]
        found = [site for module in inside if (site := _linear_map_of(module)) and site.kind != "embedding"]
        if found:
            return found[0].in_features, found[-1].out_features
        sizes = [p.shape[-1] for module in inside for p in module._parameters.values() if p is not None and p.dim()]
        if not sizes:
            raise OptionError(
                f"a {bare_class(self.layer).__name__} holds no weight that would tell how wide it is; name a block "
                "that does"
            )
        return sizes[0], sizes[0]

    @property
    def weight(self) -> Tensor:
        raise self._no_weight()

    def run(self, x: Tensor) -> Tensor:
        return self(x)

    def layout(self, W: Tensor) -> Tensor:
        raise self._no_weight()

    def forward_with(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        raise self._no_weight()

    def project(self, x: Tensor, A: Tensor) -> Tensor:
        raise self._no_weight()

    def expand(self, z: Tensor, B: Tensor) -> Tensor:
        raise self._no_weight()

    def _no_weight(self) -> NoWeightError:
        return NoWeightError(f"a {bare_class(self.layer).__name__} is adapted as a block, which has no weight")


class MatrixSite(LinearSite):
    """One matrix of a parameter that its module computes with itself."""

    readable = called = False


_TENSORS = (Tensor, nn.Parameter)  # not a subclass, which may compute in its own way


def _is_gpt2_conv1d(layer: nn.Module) -> bool:
    # By name, so that importing isotune does not import transformers' model code.
    return bare_class(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


def site_of(layer: nn.Module, kinds: Collection[str] = ()) -> Site | None:
    """The site of a layer, or None where no kind fits (also for a subclass that computes something else).

    Where "block" is among `kinds`, any module is one, unless it is of another of these kinds.
    """
    found = _linear_map_of(layer)
    return Block(layer) if "block" in kinds and (found is None or found.kind not in kinds) else found


def _linear_map_of(layer: nn.Module) -> Site | None:
    if isinstance(layer, nn.Linear):
        return PackedLinearSite(layer) if is_packed(layer) else LinearSite(layer)
    if isinstance(layer, Matrix):
        return MatrixSite(layer)
    if isinstance(layer, nn.Conv2d) and bare_class(layer).forward is nn.Conv2d.forward:
        return Conv2dSite(layer)
    if (
        isinstance(layer, nn.Embedding)
        and bare_class(layer).forward is nn.Embedding.forward
        and layer.max_norm is None
    ):
        return EmbeddingSite(layer)
    return Conv1DSite(layer) if _is_gpt2_conv1d(layer) else None


def require_site(layer: nn.Module, name: str) -> Site:
    """The site of the layer called `name`; raises TargetError where it has none."""
    # A block that has adapters was asked for as one.
    site = _linear_map_of(layer) or (Block(layer) if "isotune" in layer._modules else None)
    if site is None:
        raise TargetError(
            f"the layer {name!r} is a {bare_class(layer).__name__}, which cannot be adapted; "
            "the kinds that can are Linear, GPT-2's Conv1D, Conv2d and Embedding"
        )
    return site


def device_of(layer: nn.Module) -> torch.device:
    """Where the layer's weight lives."""
    if isinstance(layer, Matrix):
        return layer.parameter.device
    return next(itertools.chain(layer.parameters(), layer.buffers())).device
