"""HRA, Householder reflection adaptation: orthogonal and low-rank at once.

    W' = W H,   H = H_1 H_2 ... H_r = I - U S⁻¹ Uᵀ,   H_i = I - 2 u_i u_iᵀ / |u_i|²

with U (in x r) trained, and S (r x r) as in `linalg.householder`; H_1 stands next to W. On the output side
(`side="out"`) `W' = Hᵀ W` with U (out x r), which is what the paper's LLaMA code does.

Paper: "Bridging the Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation",
NeurIPS 2024, arXiv 2405.17484. Parameters: r in. Cost for n rows: 4 n in r + 2 in r² flops, LoRA's order.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from isotune.adapters.contract import Side, check_tensors
from isotune.adapters.settings import Settings, check_rank
from isotune.adapters.thin_rotation import ThinRotation
from isotune.errors import OptionError
from isotune.kernels.householder import compact_wy
from isotune.linalg.householder import (
    mean_length,
    orthogonality_penalty,
    orthonormal_basis,
    unit_columns,
)
from isotune.sites import CONVOLUTIONS, EMBEDDING, LINEAR, Site

Start = Literal["paired", "random", "anchored"]


class HRA(Settings):
    """W' = W H_1 H_2 ... H_r: the weight times r learned Householder reflections."""

    name: ClassVar[str] = "hra"
    kinds: ClassVar[frozenset[str]] = LINEAR | CONVOLUTIONS | EMBEDDING
    learning_rate: ClassVar[float] = 3e-3
    formula: ClassVar[str] = "rank * n_in"
    dialect: ClassVar[str] = "isotune.adapters.peft.hra:HRADialect"

    rank: int = Field(8, gt=0, description="Number of reflections; the rank of W' - W.")
    side: Side = Field("in", description="Rotate the layer's input or its output; an embedding's output always.")
    strict: bool = Field(False, description="Orthonormal reflections: the paper's infinite penalty.")
    start: Start | None = Field(
        None,
        description="paired: equal pairs, H = I, even rank only (default); random; "
        "anchored: H(U) H(U_0)ᵀ with U_0 frozen, H = I, rank of the change 2r (default when strict).",
    )
    penalty: float = Field(0.0, ge=0, description="Weight of the orthogonality penalty on U; the paper's lambda.")
    squared: bool = Field(True, description="Square the penalty's norm (paper) or not (the authors' code).")

    @model_validator(mode="after")
    def _start_is_possible(self) -> HRA:
        if self.strict and self.start == "paired":
            raise OptionError(
                "hra: start='paired' needs equal columns, which strict forbids; use start='anchored' or 'random'"
            )
        if self.resolved_start == "paired" and self.rank % 2:
            raise OptionError(
                f"hra: rank={self.rank} is odd, but start='paired' pairs the reflections so that they cancel, and an "
                f"odd product of reflections has determinant -1 and is never the identity; use rank={self.rank + 1}, "
                "or start='anchored' (the identity at any rank) or start='random' (changes the model at once)"
            )
        return self

    @property
    def resolved_start(self) -> Start:
        """The start, with the default filled in."""
        return self.start or ("anchored" if self.strict else "paired")

    def _side_at(self, kind: str) -> Side:
        # The one-hot rows of an embedding are no space to rotate.
        return "out" if kind == "embedding" else self.side

    @property
    def identity_at_start(self) -> bool:
        return self.resolved_start != "random"

    def build(self, site: Site, generator: torch.Generator) -> HRAAdapter:
        side = self._side_at(site.kind)
        d = site.in_features if side == "in" else site.out_features
        check_rank(self.rank, d, f"its {side}put side")
        if self.strict and self.rank == d:
            raise OptionError(
                f"hra: strict with rank={d} on a layer whose {side}put side is {d} is H = -I whatever U is, with "
                f"nothing to learn; use a rank below {d}, or strict=False"
            )
        pairs = self.resolved_start == "paired"
        U = unit_columns(torch.randn(d, self.rank // 2 if pairs else self.rank, generator=generator))
        if pairs:
            U = U.repeat_interleave(2, dim=1)
        if self.strict:
            U = orthonormal_basis(U)
        anchor = U.clone() if self.resolved_start == "anchored" else None
        return HRAAdapter(U, anchor, side, self.strict, self.penalty, self.squared)

    def parameter_count(self, site: Site) -> int:
        return self.rank * (site.in_features if self._side_at(site.kind) == "in" else site.out_features)


class HRAAdapter(ThinRotation):
    """Holds U (d x r), and U_0 (d x r, frozen) when anchored."""

    method = "hra"
    anchor: Tensor | None

    def __init__(
        self,
        U: Tensor,
        anchor: Tensor | None = None,
        side: Side = "in",
        strict: bool = False,
        penalty: float = 0.0,
        squared: bool = True,
    ) -> None:
        super().__init__()
        self.U = nn.Parameter(U)
        self.register_buffer("anchor", anchor)
        self.side = side
        self.strict, self.weight_of_penalty, self.squared = strict, penalty, squared

    def strides(self, site: Site) -> dict[str, float]:
        d, r = self.U.shape
        # Of a pair both columns move, in opposite directions.
        far = math.sqrt(d * r / (384 * 8) / (1 if self.anchor is None else 2)) / mean_length(self.U)
        # Neighbouring windows of a convolution have most of their entries in common, and a kernel of 3 x 3 turns each
        # nine times: on ResNet-20 a third of the rate is best.
        return {"U": 3 * far if site.kind in CONVOLUTIONS else far}

    @property
    def lengthless(self) -> frozenset[str]:
        return frozenset({"U"})

    def columns(self) -> Tensor:
        """The reflections that make up H, in order (d x r, or d x 2r when anchored), of any length."""
        U = orthonormal_basis(self.U) if self.strict else self.U
        # H(U_0)ᵀ is the product of the same reflections in reverse.
        return U if self.anchor is None else torch.cat([U, self.anchor.flip(1)], dim=1)

    def thin(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        return compact_wy(self.columns(), dtype)

    def penalty(self, site: Site) -> Tensor:
        if not self.weight_of_penalty:
            return super().penalty(site)
        return self.weight_of_penalty * orthogonality_penalty(self.U, self.squared)

    def peft_state(self, site: Site) -> dict[str, Tensor]:
        if self.anchor is None:
            return {"hra_u": self.U.detach()}
        state = {"hra_u": self.columns().detach()}
        # PEFT reads the columns above; U itself is kept beside them, so that training goes on bit for bit.
        return state | {"hra_u_trained": self.U.detach(), "hra_u_anchor": self.anchor}

    def load_peft_state(self, tensors: dict[str, Tensor], site: Site) -> None:
        d, r = self.U.shape
        if self.anchor is None:
            check_tensors(tensors, {"hra_u": (d, r)})
            self.U.detach().copy_(tensors["hra_u"])
            return
        check_tensors(tensors, {"hra_u": (d, 2 * r), "hra_u_trained": (d, r), "hra_u_anchor": (d, r)})
        self.U.detach().copy_(tensors["hra_u_trained"])
        self.anchor.copy_(tensors["hra_u_anchor"])
