"""OFT, orthogonal finetuning: the input turned in blocks of b coordinates, each by its own rotation.

    W' = W Rᵀ,   R = blockdiag(R_1, ..., R_D),   R_k = (I + Q_k)(I - Q_k)⁻¹,   Q_kᵀ = -Q_k  (b x b),   D = in / b

so that rows become `x R`; an embedding's rows are turned as they leave it. With `terms` R_k is the Neumann series of
the same (OFTv2), cheaper and no longer quite orthogonal. COFT (`eps`) keeps `|Q_k|_F` within a radius by projection
after each step: eps b² / √D in the authors' code, eps / √D in PEFT's. With `magnitude` also `W' = diag(s) W Rᵀ`; to
re-fit s after training, as the paper does, train it with Q frozen.

Papers: "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", NeurIPS 2023, arXiv 2306.07280; "Orthogonal
Finetuning Made Scalable", 2025, arXiv 2506.19847. Parameters: in (b - 1) / 2. Cost for n rows: 2 n in b + O(in b²).
"""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from isotune.adapters.block_rotation import BlockRotation, BlockSettings
from isotune.adapters.contract import Parts, Side, check_tensors
from isotune.errors import OptionError
from isotune.kernels.rotation import rotation
from isotune.linalg.butterfly import nearest_divisor, rotate_blocks
from isotune.linalg.cayley import above_diagonal
from isotune.sites import CONVOLUTIONS, EMBEDDING, LINEAR, Site

BLOCK = 16


class OFT(BlockSettings):
    """W' = W Rᵀ: the weight times a block-diagonal rotation."""

    name: ClassVar[str] = "oft"
    kinds: ClassVar[frozenset[str]] = LINEAR | CONVOLUTIONS | EMBEDDING
    learning_rate: ClassVar[float] = 2e-3
    size_option: ClassVar[str | None] = "block"
    formula: ClassVar[str] = "n_in * 15 // 2"
    dialect: ClassVar[str] = "isotune.adapters.peft.oft:OFTDialect"
    exempt: ClassVar[dict[str, str]] = {"seeds_decide_the_start": "it starts from zeros; nothing is drawn"}

    block: int | None = Field(
        None, gt=1, description="Size of a block, a divisor of the rotated side; by default the one nearest to 16."
    )
    nearest: bool = Field(False, description="Take the nearest divisor where `block` or `blocks` is none.")
    share: bool = Field(False, description="One rotation for all blocks.")
    terms: int | None = Field(None, ge=3, description="Terms of a Neumann series; by default R is exact.")
    eps: float | None = Field(None, gt=0, description="COFT: keep every block's Q within a radius; see `radius`.")
    radius: Literal["official", "peft"] = Field(
        "official", description="COFT's radius: eps b² / sqrt(blocks) (the authors' code) or eps / sqrt(blocks)."
    )

    def size(self, d: int) -> int:
        """The size of a block on a side of d numbers. Raises OptionError where there is none."""
        asked = self.blocks or self.block
        fitting = nearest_divisor(d, asked or BLOCK)
        if asked and fitting != asked and not self.nearest:
            raise OptionError(
                f"{'blocks' if self.blocks else 'block'}={asked} does not divide the {d} numbers that are "
                f"rotated; the nearest that does is {fitting}, which nearest=True takes"
            )
        size = d // fitting if self.blocks else fitting
        if size == 1:
            raise OptionError(
                f"blocks of size 1 have nothing to rotate, and nothing else fits the {d} numbers that are "
                f"rotated so well; choose another size, such as block={d}"
            )
        return size

    def build(self, site: Site, generator: torch.Generator) -> OFTAdapter:
        side, d = self.rotated(site)
        b = self.size(d)
        D = 1 if self.share else d // b
        radius = None
        if self.eps is not None:
            radius = self.eps * (b * b if self.radius == "official" else 1) / math.sqrt(D)
        Q = torch.zeros(D, above_diagonal(b))
        return OFTAdapter(Q, b, side, self.scale(site), self.terms, radius, self.dropout)

    def parameter_count(self, site: Site) -> int:
        d = site.out_features if site.kind == "embedding" else site.in_features
        b = self.size(d)
        return (1 if self.share else d // b) * above_diagonal(b) + (site.out_features if self.magnitude else 0)


class OFTAdapter(BlockRotation):
    """Holds Q, the numbers above the diagonals (D x b (b - 1) / 2), or (1 x ...) when shared, and perhaps s (out)."""

    method = "oft"
    parts: Parts = MappingProxyType({"Q": "skew"})

    def __init__(
        self,
        Q: Tensor,
        b: int,
        side: Side = "in",
        s: Tensor | None = None,
        terms: int | None = None,
        radius: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(side, s, dropout)
        self.Q = nn.Parameter(Q)
        self.b, self.terms, self.radius = b, terms, radius

    def strides(self, site: Site) -> dict[str, float]:
        d = site.in_features if self.side == "in" else site.out_features
        return {"Q": math.sqrt(d * (self.b - 1) / (384 * 15))}

    def blocks(self) -> Tensor:
        return rotation(self.Q, self.b, self.terms)

    def turn(self, v: Tensor, blocks: Tensor, transpose: bool) -> Tensor:
        return rotate_blocks(v, blocks.mT if transpose else blocks)

    def after_step(self, progress: float) -> None:
        self._project()

    @torch.no_grad()
    def _project(self) -> None:
        if self.radius is None:
            return
        norms = math.sqrt(2) * torch.linalg.vector_norm(self.Q, dim=1, keepdim=True)
        # A projected block may be too large by rounding: it stays as it is, so that projecting twice changes no bit.
        outside = norms > self.radius * (1 + 1e-6)
        self.Q.copy_(torch.where(outside, self.Q * (self.radius / norms), self.Q))

    def _peft_name(self) -> str:
        return "oft_embedding_R.weight" if self.side == "out" else "oft_R.weight"

    def peft_state(self, site: Site) -> dict[str, Tensor]:
        # PEFT's exact form is (I - Q)(I + Q)⁻¹, though its series is that of the inverse.
        Q = self.Q.detach() if self.terms else -self.Q.detach()
        return {self._peft_name(): Q} | ({} if self.s is None else {"oft_magnitude": self.s.detach()})

    def load_peft_state(self, tensors: dict[str, Tensor], site: Site) -> None:
        check_tensors(tensors, {name: tuple(t.shape) for name, t in self.peft_state(site).items()})
        Q = tensors[self._peft_name()]
        self.Q.detach().copy_(Q if self.terms else -Q)
        if self.s is not None:
            self.s.detach().copy_(tensors["oft_magnitude"])
        # PEFT projects before it uses Q, so that its files hold what the last step left.
        self._project()
