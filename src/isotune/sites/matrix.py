"""A weight that is no layer of its own."""

from __future__ import annotations

from typing import Any

from torch import nn

from isotune.matrix import Matrix
from isotune.sites.linear import LinearSite


class MatrixSite(LinearSite):
    """One matrix of a parameter that its module computes with itself."""

    readable = called = False

    @classmethod
    def of(cls, layer: nn.Module) -> bool:
        return isinstance(layer, Matrix)

    def entry(self) -> dict[str, Any]:
        return {**super().entry(), "matrix": {"index": self.layer.index, "transposed": self.layer.transposed}}
