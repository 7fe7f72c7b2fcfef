"""Rotations made of small orthogonal blocks, with an optional learned scale for every output."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from isotune.adapters.contract import Rotation, Side, autocast
from isotune.linalg.butterfly import drop_blocks
from isotune.sites import Site


class BlockRotation(Rotation):
    """`W' = diag(s) W Rᵀ` (side "in": rows x become x R) or `W' = diag(s) Rᵀ W` (side "out": rows y become y R).

    s (out) is trained, or None for no scale. While training, the share `dropout` of R's blocks is the identity.
    """

    def __init__(self, side: Side, s: Tensor | None, dropout: float) -> None:
        super().__init__()
        self.side, self.dropout = side, dropout
        self.s = None if s is None else nn.Parameter(s)

    @abstractmethod
    def blocks(self) -> Tensor:
        """The orthogonal blocks that R is made of (..., b, b), in fp32 or better."""

    @abstractmethod
    def turn(self, v: Tensor, blocks: Tensor, transpose: bool) -> Tensor:
        """`v R`, or `v Rᵀ`, for rows v (..., d), in v's dtype."""

    def rotate(self, v: Tensor, transpose: bool = False) -> Tensor:
        # What a Rotation calls R is on the side "in" the transpose of this one.
        return self.turn(v, self.blocks(), transpose != (self.side == "in"))

    def forward(self, x: Tensor, site: Site) -> Tensor:
        R = self.blocks()
        if self.training and self.dropout:
            R = drop_blocks(R.flatten(0, -3), self.dropout).view(R.shape)
        if self.side == "in" and site.rotates_input:
            rows = self.turn(autocast(x), R, False)
            return site(rows) if self.s is None else self._scaled(site.linear(rows), site.bias)
        if self.side == "out" and site.rotates_output:
            return site.over_outputs(site(x), lambda y: self._scaled(self.turn(y, R, False), None))
        return site.forward_with(x, self._changed(site.weight, R), self.bias(site.bias))

    def weight(self, W: Tensor) -> Tensor:
        return self._changed(W, self.blocks())

    def _changed(self, W: Tensor, R: Tensor) -> Tensor:
        W = self.turn(W, R, True) if self.side == "in" else self.turn(W.mT, R, False).mT
        return W if self.s is None else self.s[:, None].to(W.dtype) * W

    def _scaled(self, y: Tensor, bias: Tensor | None) -> Tensor:
        """`s y + bias` for rows y (..., out)."""
        if self.s is None:
            return y
        s = self.s.to(y.dtype)
        return y * s if bias is None else torch.addcmul(bias.to(y.dtype), y, s)
