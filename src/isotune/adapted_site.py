"""A site with an adapter on it, which is again a site, so that adapters stack."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from isotune.linalg.precision import at_least_fp32
from isotune.sites import Site

if TYPE_CHECKING:
    from isotune.adapters.contract import Adapter


class AdaptedSite(Site):
    """A site with an adapter on it."""

    def __init__(self, base: Site, adapter: Adapter) -> None:
        super().__init__(base.layer)
        self.base, self.adapter = base, adapter

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.adapter(x, self.base, *args, **kwargs)

    def run(self, x: Tensor) -> Tensor:
        return self(x)

    @property
    def kind(self) -> str:  # type: ignore[override]
        return self.base.kind

    @property
    def rotates_input(self) -> bool:  # type: ignore[override]
        return self.base.rotates_input

    @property
    def rotates_output(self) -> bool:  # type: ignore[override]
        return self.base.rotates_output

    @property
    def features(self) -> int:  # type: ignore[override]
        return self.base.features

    @property
    def packed(self) -> bool:  # type: ignore[override]
        return self.base.packed

    @property
    def weight(self) -> Tensor:
        # At least fp32: this is the dense twin, which fold, export and every test rely on.
        return self.adapter.weight(at_least_fp32(self.base.weight))

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    def layout(self, W: Tensor) -> Tensor:
        return self.base.layout(W)

    def rows(self, x: Tensor) -> int:
        return self.base.rows(x)

    @property
    def bias(self) -> Tensor | None:
        return self.adapter.bias(self.base.bias)

    def forward_with(self, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
        return self.base.forward_with(x, W, b)

    def project(self, x: Tensor, A: Tensor) -> Tensor:
        return self.base.project(x, A)

    def expand(self, z: Tensor, B: Tensor) -> Tensor:
        return self.base.expand(z, B)
