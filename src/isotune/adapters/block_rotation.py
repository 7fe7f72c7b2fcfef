"""Rotations made of small orthogonal blocks, with an optional learned scale for every output: options and adapter."""

from __future__ import annotations

from abc import abstractmethod

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from isotune.adapters.cache import Kept
from isotune.adapters.contract import Rotation, Side
from isotune.adapters.once import Once
from isotune.adapters.settings import Settings
from isotune.errors import OptionError
from isotune.linalg.autograd import transformed
from isotune.linalg.butterfly import drop_blocks
from isotune.linalg.precision import autocast, compute_dtype
from isotune.sites import Site


class BlockSettings(Settings):
    """What methods that rotate in blocks can be asked."""

    block: int | None = Field(None, gt=1, description="Size of a block; by default one that suits the rotated side.")
    blocks: int | None = Field(None, gt=0, description="Number of blocks, in place of their size.")
    magnitude: bool = Field(False, description="Also train a scale for every output.")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="Share of the blocks, rounded down, that are the identity in training."
    )

    @model_validator(mode="after")
    def _one_size(self) -> BlockSettings:
        if self.block and self.blocks:
            raise OptionError(
                f"{self.name}: block={self.block} and blocks={self.blocks} were both given; give one of them"
            )
        return self

    def rotated(self, site: Site) -> tuple[Side, int]:
        """The side that is rotated and its size; the one-hot rows of an embedding are no space to rotate."""
        return ("out", site.out_features) if site.kind == "embedding" else ("in", site.in_features)

    def scale(self, site: Site) -> Tensor | None:
        """The scale of every output (out) to start from, where one is trained."""
        return torch.ones(site.out_features) if self.magnitude else None


class BlockRotation(Rotation):
    """`W' = diag(s) W Rᵀ` (side "in": rows x become x R) or `W' = diag(s) Rᵀ W` (side "out": rows y become y R).

    s (out) is trained, or None for no scale. While training, the share `dropout` of R's blocks is the identity.
    """

    def __init__(self, side: Side, s: Tensor | None, dropout: float) -> None:
        super().__init__()
        self.side, self.dropout = side, dropout
        self._once = Once()
        self._kept: Kept[Tensor] = Kept()
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
        R = self._blocks(compute_dtype(x))
        if self.training and self.dropout:
            R = drop_blocks(R.flatten(0, -3), self.dropout).view(R.shape)
        if self.side == "in" and site.rotates_input:
            rows = self.turn(autocast(x), R, False)
            return site(rows) if self.s is None else self._scaled(site.linear(rows), site.bias)
        if self.side == "out" and site.rotates_output:
            return site.over_outputs(site(x), lambda y: self._scaled(self.turn(y, R, False), None))
        return site.forward_with(x, self._changed(site.weight, R), self.bias(site.bias))

    def _blocks(self, dtype: torch.dtype) -> Tensor:
        """The blocks: once a step in training, once for many calls at inference, where they are rounded once."""
        if self.training or torch.is_grad_enabled() or transformed():
            self._kept.forget()
            return self._once.get(self, lambda: (self.blocks(),))[0]
        dtype = dtype if dtype.is_floating_point else torch.float32  # indices into an embedding
        return self._kept.get((*self.parameters(), *self.buffers()), lambda: self.blocks().to(dtype), dtype)

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
