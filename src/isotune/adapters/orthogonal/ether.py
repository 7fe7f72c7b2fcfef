"""ETHER, hyperplane reflections: one Householder reflection for each block of the weight's columns.

    W' = W diag(H_1, ..., H_k),   H_i = I - 2 û_i û_iᵀ,   û_i = u_i / |u_i|

with u_i (in / k) trained. Every H_i is symmetric, is its own inverse, and lies at distance |H_i - I|_F = 2 from the
identity, whatever u_i: learning rates can be high, and a fresh adapter changes the model at once.

Paper: "ETHER: Efficient Finetuning of Large-Scale Models with Hyperplane Reflections", ICML 2024, arXiv 2405.20271.
Parameters: in, for any k. Cost for n rows: 4 n in k flops, with all blocks in one thin product of rank k.

In the authors' code more than one block groups rows of W's memory, not columns; here blocks are blocks of columns.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from isotune.adapters.contract import Side
from isotune.adapters.settings import Settings
from isotune.adapters.thin_rotation import ThinRotation
from isotune.errors import OptionError
from isotune.linalg.householder import block_columns, mean_length, unit_columns
from isotune.linalg.precision import at_least_fp32, rounded
from isotune.linalg.random_bases import uniform
from isotune.sites import CONVOLUTIONS, EMBEDDING, LINEAR, Site


class ETHER(Settings):
    """W' = W diag(H_1, ..., H_k): one learned reflection for each block of inputs; never the identity."""

    name: ClassVar[str] = "ether"
    kinds: ClassVar[frozenset[str]] = LINEAR | CONVOLUTIONS | EMBEDDING
    learning_rate: ClassVar[float] = 5e-3
    formula: ClassVar[str] = "n_in"

    blocks: int = Field(
        1, gt=0, description="Number of blocks, each with a reflection of its own; the rank of W' - W."
    )

    @property
    def identity_at_start(self) -> bool:
        return False

    def build(self, site: Site, generator: torch.Generator) -> ETHERAdapter:
        # The one-hot rows of an embedding are no space to reflect.
        side: Side = "out" if site.kind == "embedding" else "in"
        d = site.out_features if side == "out" else site.in_features
        return ETHERAdapter(block_vectors(self.name, d, self.blocks, side, generator), side)

    def parameter_count(self, site: Site) -> int:
        return site.out_features if site.kind == "embedding" else site.in_features


def block_vectors(method: str, d: int, blocks: int, side: Side, generator: torch.Generator) -> Tensor:
    """One vector for each block of a side of size d (blocks x d / blocks), uniform as the authors draw it.

    Raises OptionError where the blocks do not divide d, or are one wide, so that there is nothing to learn.
    """
    if d % blocks or d // blocks < 2:
        raise OptionError(
            f"{method}: blocks={blocks} does not cut the {side}put side, {d}, into equal blocks of at least 2; "
            "choose another divisor, or blocks=1"
        )
    size = d // blocks
    return uniform((blocks, size), 1 / math.sqrt(size), generator)


class ETHERAdapter(ThinRotation):
    """Holds u (k x d / k), of which only the directions matter; a zero vector stands for no reflection."""

    method = "ether"

    def __init__(self, u: Tensor, side: Side) -> None:
        super().__init__()
        self.u = nn.Parameter(u)
        self.side = side

    def strides(self, site: Site) -> dict[str, float]:
        return {"u": math.sqrt(self.u.numel() / 384) / mean_length(self.u.mT)}

    @property
    def lengthless(self) -> frozenset[str]:
        return frozenset({"u"})

    def thin(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        U = unit_columns(block_columns(at_least_fp32(self.u)))
        return rounded((U, 2 * U.mT), dtype)
