"""A module as a whole, such as an MLP, an attention, or a layer of a transformer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from isotune.bare import HOME, bare_class, bare_forward
from isotune.errors import NoWeightError, OptionError
from isotune.sites.convolution import Conv1dSite, Conv2dSite, Conv3dSite
from isotune.sites.gpt2 import GPT2Conv1DSite
from isotune.sites.linear import LinearSite, PackedLinearSite
from isotune.sites.site import Site

_ROWS: tuple[type[Site], ...] = (LinearSite, PackedLinearSite, GPT2Conv1DSite, Conv1dSite, Conv2dSite, Conv3dSite)


class Block(Site):
    """`y = f(x, ...)`: a module without a weight of its own, as a whole. Of several outputs the first tensor counts.

    x (..., in) and y (..., out): in is what the first weight in the module reads, out what the last one gives.
    """

    kind = "block"
    readable = False

    @classmethod
    def hollow(cls, weight: Tensor) -> nn.Module:
        return nn.Sequential(LinearSite.hollow(weight))

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
        inside = [module for name, module in self.layer.named_modules() if HOME not in name.split(".")]
        found = [kind(module) for module in inside for kind in _ROWS if kind.of(module)]
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


def replaced_first(y: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """What a block gave (a tensor, a tuple, or transformers' mapping), its first tensor changed, of any shape."""
    if isinstance(y, Tensor):
        return change(y)
    if isinstance(y, Mapping):
        name = next(iter(y))
        return type(y)(**{**y, name: change(y[name])})
    return (change(y[0]), *y[1:])
