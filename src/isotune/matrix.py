"""Weights that are no layer of their own: one matrix of a parameter of some module.

Packed attention projections, recurrent weights, transposed convolutions and the experts of a mixture are parameters
that their module's own code computes with. A `Matrix` gives one such weight the questions that a layer answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy

from isotune.quantised import DENSE


class Matrix(nn.Module):
    """`weight` (out, in), a live view of the parameter `name` of `owner`, or of one expert's part of it.

    A parameter of more than two dimensions is flattened behind the first; `transposed` says that the result is
    (in, out): W of a transposed convolution is (out / groups * kh * kw, in), of an expert as its module has it.
    """

    owner: nn.Module
    bias: None = None

    def __init__(self, owner: nn.Module, name: str, index: int | None = None, transposed: bool = False) -> None:
        super().__init__()
        self.__dict__["owner"] = owner  # not as a submodule: it contains what holds this
        self.name, self.index, self.transposed = name, index, transposed
        self.train(owner.training)

    @property
    def parameter(self) -> Tensor:
        """The whole parameter of the owner, as it is without adapters."""
        chain = parametrization(self.owner, self.name)
        return getattr(self.owner, self.name) if chain is None else chain.original

    @property
    def weight(self) -> Tensor:
        """The matrix (out, in)."""
        return self.view(self.parameter)

    @property
    def in_features(self) -> int:
        """Columns of the matrix."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """Rows of the matrix."""
        return self.weight.shape[0]

    def view(self, parameter: Tensor) -> Tensor:
        """The matrix (out, in) in a tensor of the parameter's shape."""
        return as_matrix(parameter, self.index, self.transposed)

    def part(self, W: Tensor) -> Tensor:
        """W (out, in) in the shape that it has in the parameter; the inverse of `view`, for one expert."""
        shape = self.parameter.shape if self.index is None else self.parameter.shape[1:]
        return (W.mT if self.transposed else W).reshape(shape)

    def forward(self, x: Tensor) -> Tensor:
        """`x Wᵀ`."""
        return F.linear(x, self.weight)


def as_matrix(parameter: Tensor, index: int | None = None, transposed: bool = False) -> Tensor:
    """The matrix (out, in) of a parameter, or of its expert `index`: see `Matrix`."""
    W = (parameter if index is None else parameter[index]).flatten(1)
    return W.mT if transposed else W


def matrices_of(owner: nn.Module) -> Iterator[tuple[str, Matrix]]:
    """The matrices among the owner's own parameters, by name: `weight_ih_l0`, and `down_proj.3` for an expert's.

    Three dimensions mean experts, except for a convolution. Biases, vectors and packed numbers are none.
    """
    lists = getattr(owner, "parametrizations", {})
    # With others' parametrizations on it, a parameter is no longer what its module computes with.
    originals = {name: chain.original for name, chain in lists.items() if hasattr(chain[0], "matrices")}
    for name, parameter in {**owner._parameters, **originals}.items():
        if parameter is None or is_lazy(parameter) or parameter.dtype not in DENSE or "bias" in name:
            continue
        if isinstance(owner, _ConvNd):
            yield name, Matrix(owner, name, transposed=isinstance(owner, _ConvTransposeNd))
        elif parameter.dim() in (2, 3) and min(parameter.shape) > 1:
            transposed = parameter.dim() == 3 and bool(getattr(owner, "is_transposed", False))
            for index in range(len(parameter)) if parameter.dim() == 3 else (None,):
                path = name if index is None else f"{name}.{index}"
                yield path, Matrix(owner, name, index, transposed)


def parametrization(owner: nn.Module, name: str) -> Any:
    """The parametrizations on a parameter of the owner (torch's `ParametrizationList`), or None."""
    lists = getattr(owner, "parametrizations", None)
    return lists[name] if isinstance(lists, nn.ModuleDict) and name in lists else None
