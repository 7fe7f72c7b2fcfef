"""BOFT, OFT by butterfly factorization: a few sparse rotations whose product joins distant coordinates.

    W' = diag(s) W Rᵀ,   R = B_m ... B_2 B_1,   B_i = P_i blockdiag(R_i1, ..., R_iD) P_iᵀ,   D = in / b

with R_ik (b x b) the Cayley transforms of skew-symmetric matrices, P_i the butterfly permutations of
`linalg.butterfly`, and s (out) trained from ones; rows become `x R`, factor by factor. One factor is OFT. Several
need an even b and a width that b 2^(m-1) divides; m = log2(D) + 1 of them make R dense. PEFT without its CUDA
extension has one factor whatever its config says, and refuses files with more.

Paper: "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization", ICLR 2024, arXiv 2311.06243.
Parameters: m in (b - 1) / 2 + out. Cost for n rows: 2 n in b m + O(m in b²) flops.
"""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from isotune.adapters.block_rotation import BlockRotation, BlockSettings
from isotune.adapters.contract import Parts, Side, check_tensors
from isotune.errors import OptionError
from isotune.kernels.rotation import rotation
from isotune.linalg.butterfly import rotate_butterfly
from isotune.linalg.cayley import above_diagonal, skew, upper_of
from isotune.sites import CONVOLUTIONS, EMBEDDING, LINEAR, Site

BLOCK, FACTORS = 8, 2


class BOFT(BlockSettings):
    """W' = diag(s) W (B_m ... B_1)ᵀ: the weight times a butterfly of block-diagonal rotations, its rows scaled."""

    name: ClassVar[str] = "boft"
    kinds: ClassVar[frozenset[str]] = LINEAR | CONVOLUTIONS | EMBEDDING
    learning_rate: ClassVar[float] = 2e-3
    size_option: ClassVar[str | None] = "block"
    formula: ClassVar[str] = "7 * n_in + n_out"
    dialect: ClassVar[str] = "isotune.adapters.peft.boft:BOFTDialect"
    exempt: ClassVar[dict[str, str]] = {"seeds_decide_the_start": "it starts from zeros; nothing is drawn"}

    block: int | None = Field(
        None, gt=1, description="Size of a block; by default 8, or what is possible near it on the rotated side."
    )
    factors: int | None = Field(
        None, gt=0, le=16, description="Number of butterfly factors; by default 2 where the size allows it, else 1."
    )
    magnitude: bool = Field(True, description="Also train a scale for every output.")

    def sizes(self, d: int) -> tuple[int, int]:
        """b and m on a side of d numbers. Raises OptionError where there are none."""
        for m in (self.factors,) if self.factors else (FACTORS, 1):
            fitting = [b for b in range(2, d + 1) if d % (b * 2 ** (m - 1)) == 0 and (m == 1 or b % 2 == 0)]
            if self.block or self.blocks:
                fitting = [b for b in fitting if b == self.block or b * (self.blocks or 0) == d]
            if fitting:
                return min(fitting, key=lambda b: (abs(b - BLOCK), b)), m
        asked = {"block": self.block, "blocks": self.blocks, "factors": self.factors}
        raise OptionError(
            f"{', '.join(f'{name}={value}' for name, value in asked.items() if value)} does not fit the {d} numbers "
            "that are rotated: the size of a block times 2^(factors - 1) has to divide them, and to be even for two "
            "factors or more; leave the options out for sizes that fit"
        )

    def build(self, site: Site, generator: torch.Generator) -> BOFTAdapter:
        side, d = self.rotated(site)
        b, m = self.sizes(d)
        Q = torch.zeros(m, d // b, above_diagonal(b))
        return BOFTAdapter(Q, b, side, self.scale(site), self.dropout)

    def parameter_count(self, site: Site) -> int:
        d = site.out_features if site.kind == "embedding" else site.in_features
        b, m = self.sizes(d)
        return m * (d // b) * above_diagonal(b) + (site.out_features if self.magnitude else 0)


class BOFTAdapter(BlockRotation):
    """Holds Q, the numbers above the diagonals (m x D x b (b - 1) / 2), and perhaps s (out)."""

    method = "boft"
    parts: Parts = MappingProxyType({"Q": "skew"})

    def __init__(self, Q: Tensor, b: int, side: Side = "in", s: Tensor | None = None, dropout: float = 0.0) -> None:
        super().__init__(side, s, dropout)
        self.Q = nn.Parameter(Q)
        self.b = b

    def strides(self, site: Site) -> dict[str, float]:
        return {"Q": math.sqrt(2 * self.Q.numel() / (2 * 384 * 7))}

    def blocks(self) -> Tensor:
        return rotation(self.Q, self.b)

    def turn(self, v: Tensor, blocks: Tensor, transpose: bool) -> Tensor:
        return rotate_butterfly(v, blocks, transpose)

    def peft_state(self, site: Site) -> dict[str, Tensor]:
        # PEFT stores any matrix A and takes (I - S)(I + S)⁻¹ of its skew part S.
        s = torch.ones(site.out_features) if self.s is None else self.s.detach()
        return {
            "boft_R": -skew(self.Q.detach(), self.b),
            "boft_s": s[None] if site.kind in CONVOLUTIONS else s[:, None],
        }

    def load_peft_state(self, tensors: dict[str, Tensor], site: Site) -> None:
        expected = {name: tuple(t.shape) for name, t in self.peft_state(site).items()}
        if "boft_R" in tensors and len(tensors["boft_R"]) == 1:
            # Without its CUDA extension PEFT trains one factor, whatever its config says: the others are no rotation.
            expected["boft_R"] = (1, *expected["boft_R"][1:])
        check_tensors(tensors, expected)
        A = tensors["boft_R"]
        self.Q.detach().zero_()[: len(A)].copy_(upper_of((A.mT - A) / 2))
        if self.s is not None:
            self.s.detach().copy_(tensors["boft_s"].flatten())
