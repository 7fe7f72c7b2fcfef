"""PSOFT, orthogonal finetuning in the principal subspace: a rotation of W's largest singular directions only.

    W' = W + B (diag(β) R diag(α) - I) A,   A = V_rᵀ (r x in),   B = U_r Σ_r (out x r),   R = (I + Q)(I - Q)⁻¹ (r x r)

with W = U Σ Vᵀ; A and B are frozen copies of that part of W, which itself stays as it is. β and α (r) start at one,
Q, skew-symmetric, at zero. An exact LoRA of rank r, whatever PEFT's `psoft_alpha` (it cancels). A and B are stored
beside PEFT's tensors, because the signs of singular vectors are not the same on every machine.

Paper: "Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation", ICLR 2026, arXiv 2505.11235.
Parameters: r (r - 1) / 2 + 2 r. Cost for n rows: 2 n r (in + out) flops; the start takes an SVD of W.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from isotune.adapters.contract import LowRank, check_tensors
from isotune.adapters.settings import Settings, check_rank
from isotune.errors import OptionError
from isotune.kernels.rotation import rotation
from isotune.linalg.cayley import above_diagonal, cayley_neumann, skew, upper_of
from isotune.linalg.precision import at_least_fp32
from isotune.linalg.triplets import principal_directions, row_signs
from isotune.sites import CONVOLUTIONS, EMBEDDING, LINEAR, Site


class PSOFT(Settings):
    """W' = W + B (diag(β) R diag(α) - I) A: the principal part B A of the weight, rotated and rescaled."""

    name: ClassVar[str] = "psoft"
    kinds: ClassVar[frozenset[str]] = LINEAR | CONVOLUTIONS | EMBEDDING
    learning_rate: ClassVar[float] = 1e-2
    formula: ClassVar[str] = "rank * (rank + 3) // 2"
    dialect: ClassVar[str] = "isotune.adapters.peft.psoft:PSOFTDialect"
    exempt: ClassVar[dict[str, str]] = {"seeds_decide_the_start": "it starts from W's SVD; nothing is drawn"}

    rank: int = Field(16, gt=0, description="How many singular directions are rotated; the rank of W' - W.")
    orthogonal: bool = Field(True, description="Keep R a rotation; otherwise any r x r matrix is trained.")
    scale_out: bool = Field(True, description="Train β, the scale behind R.")
    scale_in: bool = Field(True, description="Train α, the scale before R.")
    basis: Literal["orthonormal", "balanced"] = Field(
        "orthonormal",
        description="orthonormal: A = V_rᵀ; balanced: A and B share the singular values (PEFT's pissa).",
    )
    terms: int | None = Field(None, ge=3, description="Terms of a Neumann series; by default R is exact.")
    largest: float | None = Field(None, gt=0, lt=1, description="Shrink Q to this Frobenius norm, with `terms` only.")
    svd: Literal["full", "lowrank"] = Field("full", description="Exact, or randomised with `iterations`.")
    iterations: int = Field(10, ge=0, description="Power iterations of the randomised SVD.")
    svd_seed: int = Field(0, ge=0, description="Seed of the randomised SVD.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the input of A while training.")

    @model_validator(mode="after")
    def _something_to_train(self) -> PSOFT:
        if self.rank == 1 and self.orthogonal and not (self.scale_in or self.scale_out):
            raise OptionError("psoft: a single direction has no rotation; use rank=2 or more, or one of the scales")
        return self

    def build(self, site: Site, generator: torch.Generator) -> PSOFTAdapter:
        B, A = self.principal_part(site)
        signs = row_signs(A)
        adapter = self._adapter(B * signs, A * signs[:, None])
        adapter.signs = signs
        return adapter

    def shell(self, site: Site) -> PSOFTAdapter:
        return self._adapter(torch.zeros(site.out_features, self.rank), torch.zeros(self.rank, site.in_features))

    def _adapter(self, B: Tensor, A: Tensor) -> PSOFTAdapter:
        check_rank(self.rank, min(len(B), A.shape[1]), "its smaller side")
        R = torch.zeros(above_diagonal(self.rank)) if self.orthogonal else torch.eye(self.rank)
        return PSOFTAdapter(B.contiguous(), A.contiguous(), R, self)

    def principal_part(self, site: Site) -> tuple[Tensor, Tensor]:
        """B (out, r) and A (r, in) of the layer's weight, with the signs that PEFT would find. Raises OptionError."""
        check_rank(self.rank, min(site.in_features, site.out_features), "its smaller side")
        iterations = self.iterations if self.svd == "lowrank" else None
        U, S, Vh = principal_directions(site.weight, self.rank, iterations, self.svd_seed)
        left, right = (S.sqrt(), S.sqrt()) if self.basis == "balanced" else (S, torch.ones_like(S))
        return U * left, right[:, None] * Vh

    def parameter_count(self, site: Site) -> int:
        return (above_diagonal(self.rank) if self.orthogonal else self.rank**2) + self.rank * (
            self.scale_in + self.scale_out
        )


class PSOFTAdapter(LowRank):
    """Holds B (out x r) and A (r x in), frozen; trains Q (r (r - 1) / 2), or R (r x r), and perhaps β and α (r)."""

    method = "psoft"
    A: Tensor
    B: Tensor
    R: Tensor
    signs: Tensor

    def __init__(self, B: Tensor, A: Tensor, R: Tensor, settings: PSOFT) -> None:
        super().__init__(settings.dropout)
        self.register_buffer("A", A)
        self.register_buffer("B", B)
        r = len(A)
        self.register_buffer("signs", torch.ones(r), persistent=False)
        if R.numel():
            self.R = nn.Parameter(R)
        else:
            self.register_buffer("R", R)  # the rotation of a single direction: no numbers to train
        self.beta = nn.Parameter(torch.ones(r)) if settings.scale_out else None
        self.alpha = nn.Parameter(torch.ones(r)) if settings.scale_in else None
        self.settings = settings
        self.parts = {"R": "skew" if settings.orthogonal else "matrix"}

    def strides(self, site: Site) -> dict[str, float]:
        r = len(self.A)
        return {"R": math.sqrt(r * (r - 1) / (16 * 15))} if self.settings.orthogonal and r > 1 else {}

    def rotation(self) -> Tensor:
        """R (r, r), in fp32 or better, without its scales."""
        s = self.settings
        if not s.orthogonal:
            return at_least_fp32(self.R)
        if s.terms is None:
            return rotation(self.R, s.rank)
        Q = skew(self.R, s.rank)
        if s.largest is not None:
            norm = torch.linalg.matrix_norm(Q).clamp_min(s.largest)
            Q = Q * (s.largest / norm)
        return cayley_neumann(Q, s.terms)

    def change(self) -> tuple[Tensor, Tensor]:
        M = self.rotation()
        if self.beta is not None:
            M = self.beta[:, None] * M
        if self.alpha is not None:
            M = M * self.alpha
        return self.B @ (M - torch.eye(len(M), dtype=M.dtype, device=M.device)), self.A

    def _trained(self) -> dict[str, Tensor]:
        """What is trained, by PEFT's names, for the signs that A's rows have."""
        named = {"weight": self.R, "vector_b": self.beta, "vector_a": self.alpha}
        return {f"psoft_R.{name}": t.detach() for name, t in named.items() if t is not None}

    def peft_state(self, site: Site) -> dict[str, Tensor]:
        # PEFT finds A and B anew and takes the signs that come, so everything is stored for those.
        flips = self.signs[:, None] * self.signs
        flipped = self.R.detach() * (upper_of(flips) if self.settings.orthogonal else flips)
        own = {"psoft_A": self.A * self.signs[:, None], "psoft_B": self.B * self.signs}
        return self._trained() | {"psoft_R.weight": flipped} | own

    def load_peft_state(self, tensors: dict[str, Tensor], site: Site) -> None:
        trained = self._trained()
        if tensors.keys() == trained.keys():
            # PEFT's own file.
            B, A = self.settings.principal_part(site)
            tensors = tensors | {"psoft_A": A, "psoft_B": B}
        own = trained | {"psoft_A": self.A, "psoft_B": self.B}
        check_tensors(tensors, {name: tuple(t.shape) for name, t in own.items()})
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
        self.signs.fill_(1)
