"""Methods that train a thin part of W, found by decomposing it, with W itself left as it is.

    W' = W + s (B A - B0 A0),   B (out x r), A (r x in),   s = alpha / r, or alpha / √r

B0 and A0 are where B and A started; their product is the part of W that is trained. The papers freeze the residual
`W - s B0 A0` in the place of W, and lose W; the two are the same map. The change has rank 2r, and it is computed as
`(B - B0) A + B0 (A - A0)`: nothing large cancels, and before training it is zero to the bit, in every dtype.

On disk it is a plain LoRA of rank 2r, `A' = [A; A0]` and `B' = [B, -B0]`, with alpha scaled so that s stays. The
four matrices are read off it again bit for bit.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from isotune.adapters.contract import LowRank, check_tensors
from isotune.adapters.low_rank.lora import LoRA, lora_tensors
from isotune.adapters.settings import Settings, check_rank
from isotune.errors import OptionError
from isotune.sites import CONVOLUTIONS, EMBEDDING, LINEAR, Site


class Sizes(NamedTuple):
    """What every one of these adapters is told."""

    n_out: int
    n_in: int
    rank: int
    scale: float
    dropout: float


class PrincipalSettings(Settings):
    """The options that these methods have in common."""

    kinds: ClassVar[frozenset[str]] = LINEAR | CONVOLUTIONS | EMBEDDING
    learning_rate: ClassVar[float] = 5e-3
    formula: ClassVar[str] = "rank * (n_in + n_out)"
    dialect: ClassVar[str] = "isotune.adapters.peft.principal:PrincipalDialect"
    exempt: ClassVar[dict[str, str]] = {
        "seeds_decide_the_start": "the start is a decomposition of W, which is the same for every seed"
    }

    rank: int = Field(8, gt=0, description="Rank of the part of W that is trained; W' - W has twice that.")
    alpha: float | None = Field(None, gt=0, description="Numerator of the scale s; the default makes s one.")
    rslora: bool = Field(False, description="Let s be alpha / sqrt(rank) in place of alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on what the change of W reads, while training.")

    @property
    def scale(self) -> float:
        """The s above."""
        divisor = math.sqrt(self.rank) if self.rslora else self.rank
        return (self.alpha or divisor) / divisor

    @abstractmethod
    def shell(self, site: Site) -> Principal:
        """The adapter before the decomposition, all zeros."""

    def sizes(self, site: Site) -> Sizes:
        """Those at a site. Raises OptionError where the rank is larger than the layer."""
        check_rank(self.rank, min(site.in_features, site.out_features), "its smaller side")
        return Sizes(site.out_features, site.in_features, self.rank, self.scale, self.dropout)

    def build(self, site: Site, generator: torch.Generator) -> Principal:
        adapter, W = self.shell(site), site.weight
        if not W.isfinite().all():
            raise OptionError(f"{self.name} decomposes the weight, and this one holds values that are not finite")
        adapter.start_from(W, generator)
        return adapter

    def parameter_count(self, site: Site) -> int:
        return self.rank * (site.in_features + site.out_features)

    def as_lora(self) -> LoRA:
        """The plain LoRA that is stored."""
        rank = 2 * self.rank
        alpha = self.scale * (math.sqrt(rank) if self.rslora else rank)
        return LoRA(rank=rank, alpha=alpha, rslora=self.rslora, dropout=self.dropout)


class Principal(LowRank):
    """Holds A (r x in) and B (out x r), and, frozen, A0 and B0."""

    A0: Tensor
    B0: Tensor

    def __init__(self, sizes: Sizes) -> None:
        super().__init__(sizes.dropout)
        A, B = torch.zeros(sizes.rank, sizes.n_in), torch.zeros(sizes.n_out, sizes.rank)
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.register_buffer("A0", A.clone())
        self.register_buffer("B0", B.clone())
        self.scale = self.product_scale = sizes.scale

    @abstractmethod
    def start_from(self, W: Tensor, generator: torch.Generator | None = None) -> None:
        """Take the start from W (out, in); a random decomposition without a generator is a repeatable one."""

    def place(self, B: Tensor, A: Tensor) -> None:
        """Let B (out, r) and A (r, in) be the start."""
        for own, value in ((self.B, B), (self.B0, B), (self.A, A), (self.A0, A)):
            own.detach().copy_(value)

    def left(self) -> Tensor:
        """What stands left of A, (out, r): B, or B with what a method puts between the two."""
        return self.B

    def change(self) -> tuple[Tensor, Tensor]:
        B = torch.cat([self.left() - self.B0, self.B0], dim=1)
        return (B if self.scale == 1 else self.scale * B), torch.cat([self.A, self.A - self.A0])

    def peft_state(self, site: Site) -> dict[str, Tensor]:
        B = torch.cat([self.left().detach(), -self.B0], dim=1)
        return lora_tensors(B, torch.cat([self.A.detach(), self.A0]), site)

    def load_peft_state(self, tensors: dict[str, Tensor], site: Site) -> None:
        r = self.A.shape[0]
        B, A = self._read(tensors, 2 * r, site)
        for own, value in ((self.B, B[:, :r]), (self.B0, -B[:, r:]), (self.A, A[:r]), (self.A0, A[r:])):
            own.detach().copy_(value)

    def _read(self, tensors: dict[str, Tensor], rank: int, site: Site) -> tuple[Tensor, Tensor]:
        """B and A of a LoRA of the given rank. Raises KeyError or ValueError where `tensors` is something else."""
        B, A = self.B.new_empty(self.B.shape[0], rank), self.A.new_empty(rank, self.A.shape[1])
        expected = lora_tensors(B.detach(), A.detach(), site)
        check_tensors(tensors, {name: tuple(view.shape) for name, view in expected.items()})
        for name, view in expected.items():
            view.copy_(tensors[name])
        return B, A


class PrincipalOfPEFT(Principal):
    """One that PEFT has too, and stores as a LoRA of rank r beside a W that it changes anew whenever it loads it."""

    def start_as_peft(self, site: Site) -> None:
        """Take the start as PEFT takes it."""
        if site.rotates_input:
            self.start_from(site.weight)
        else:  # a plain LoRA to PEFT, which decomposes linear layers only
            self.place(torch.zeros_like(self.B), torch.zeros_like(self.A))

    def load_peft_state(self, tensors: dict[str, Tensor], site: Site) -> None:
        r = self.A.shape[0]
        if not _has_rank(tensors, r):
            super().load_peft_state(tensors, site)
            return
        B, A = self._read(tensors, r, site)
        self.start_as_peft(site)
        self.B.detach().copy_(B)
        self.A.detach().copy_(A)


def _has_rank(tensors: dict[str, Tensor], rank: int) -> bool:
    names = tensors.keys() & {"lora_A.weight", "lora_embedding_A"}
    return any(tensors[name].shape[:1] == (rank,) for name in names)
