"""GOFT, orthogonal fine-tuning by Givens rotations, and qGOFT, which relaxes each of them.

    W' = W R,   R = P_1 P_2 ... P_K,   K = ⌈log₂ in⌉

with in - 1 rotations of planes in K parallel stages, as in `linalg.givens`, each by a trained angle that starts at 0.
qGOFT (`relaxed=True`) trains any 2 x 2 matrix (α_i, β_i) in place of each rotation, which starts at the identity, and
adds `penalty` Σ ⟨α_i, β_i⟩² to the loss: its columns stay nearly orthogonal, their lengths are free.

Paper: "Parameter Efficient Quasi-Orthogonal Fine-Tuning via Givens Rotation", ICML 2024, arXiv 2404.04316.
Parameters: in - 1, or 4 (in - 1) relaxed. Cost for n rows: 6 n in flops, in K passes over ever fewer axes, and
less than 2 n in numbers kept for the backward pass beside x. It has no low-rank form.

The authors' second code pairs neighbouring axes at every stage in place of axes 2^(k-1) apart, so that its stages
after the first are not rotations, and uses π tanh g for the angle; neither is followed here.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from isotune.adapters.contract import Rotation, Side
from isotune.adapters.settings import Settings
from isotune.errors import OptionError
from isotune.linalg.givens import givens_product, givens_rotations
from isotune.linalg.thin import without_autocast
from isotune.sites import CONVOLUTIONS, EMBEDDING, LINEAR, Site


class GOFT(Settings):
    """W' = W R: R is a product of in - 1 Givens rotations with one learned angle each."""

    name: ClassVar[str] = "goft"
    kinds: ClassVar[frozenset[str]] = LINEAR | CONVOLUTIONS | EMBEDDING
    learning_rate: ClassVar[float] = 2e-2
    formula: ClassVar[str] = "n_in - 1"
    exempt: ClassVar[dict[str, str]] = {"seeds_decide_the_start": "all angles are 0 at every start"}

    relaxed: bool = Field(False, description="qGOFT: any 2 x 2 matrix in place of each rotation, 4 numbers each.")
    penalty: float = Field(0.0, ge=0, description="Weight of qGOFT's penalty on the angle of each matrix's columns.")

    @model_validator(mode="after")
    def _penalty_has_an_object(self) -> GOFT:
        if self.penalty and not self.relaxed:
            raise OptionError(
                f"goft: penalty={self.penalty} has nothing to act on, because rotations are orthogonal; "
                "use relaxed=True (qGOFT), or leave the penalty out"
            )
        return self

    def build(self, site: Site, generator: torch.Generator) -> GOFTAdapter:
        # The one-hot rows of an embedding are no space to rotate.
        side: Side = "out" if site.kind == "embedding" else "in"
        d = site.out_features if side == "out" else site.in_features
        if d < 2:
            raise OptionError(f"goft: the layer's {side}put side is {d}, which has no plane to rotate")
        start = torch.eye(2).repeat(d - 1, 1, 1) if self.relaxed else torch.zeros(d - 1)
        return GOFTAdapter(start, side, self.penalty)

    def parameter_count(self, site: Site) -> int:
        return (4 if self.relaxed else 1) * (
            (site.out_features if site.kind == "embedding" else site.in_features) - 1
        )


class GOFTAdapter(Rotation):
    """Holds the angles (d - 1), or the relaxed matrices (d - 1, 2, 2), of stage 1, then of stage 2, and so on."""

    method = "goft"

    def __init__(self, planes: Tensor, side: Side, penalty: float = 0.0) -> None:
        super().__init__()
        self.planes = nn.Parameter(planes)
        self.side, self.weight_of_penalty = side, penalty

    def strides(self, site: Site) -> dict[str, float]:
        # Of the relaxed ones all four numbers move, and those on the diagonal alike at every stage.
        return {"planes": math.sqrt(len(self.planes) / 383) * (2 if self.planes.dim() == 3 else 1)}

    def rotate(self, v: Tensor, transpose: bool = False) -> Tensor:
        with without_autocast(v):
            G = self.planes if self.planes.dim() == 3 else givens_rotations(self.planes)
            return givens_product(v, G, transpose)

    def penalty(self, site: Site) -> Tensor:
        if not self.weight_of_penalty:
            return super().penalty(site)
        alpha, beta = self.planes.unbind(dim=-1)
        return self.weight_of_penalty * (alpha * beta).sum(dim=-1).square().sum()
