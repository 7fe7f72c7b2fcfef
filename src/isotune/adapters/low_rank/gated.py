"""What low-rank methods with a number for each rank have in common: ranks whose number is zero are not there."""

from __future__ import annotations

from types import MappingProxyType

from torch import Tensor, nn

from isotune.adapters.contract import LowRank, Parts


class Gated(LowRank):
    """`W' = W + s B diag(g) A`, with A (r x in), B (out x r) and g (r), all of them trained."""

    parts: Parts = MappingProxyType({"A": "A", "B": "B"})

    def __init__(self, A: Tensor, B: Tensor, g: Tensor, scale: float, dropout: float = 0.0) -> None:
        super().__init__(dropout)
        self.A, self.B, self.g = nn.Parameter(A), nn.Parameter(B), nn.Parameter(g)
        self.scale = scale

    def change(self) -> tuple[Tensor, Tensor]:
        return self.B * (self.scale * self.g), self.A

    def weight(self, W: Tensor) -> Tensor:
        B, A = self.change()  # all ranks: a gate of zero still has a gradient
        return W + B.to(W.dtype) @ A.to(W.dtype)

    def factors(self, W: Tensor) -> tuple[Tensor, Tensor]:
        B, A = self.change()
        live = self.g.detach().nonzero().flatten()
        kept = live if len(live) else live.new_zeros(1)  # a change of nothing has one rank, of zeros
        return B[:, kept].to(W.dtype), A[kept].to(W.dtype)
