"""LoKr, low-rank Kronecker product: a small matrix, each entry of which scales a copy of another one.

    W' = W + s W_1 ⊗ W_2,   W_1 (p x q), W_2 (k x n),   p k = out, q n = in,   s = alpha / r,   W_1 = 0 at the start

W_2 = B_2 A_2 of rank r where that is less than half of its larger side, else a whole matrix, and with `both` W_1 =
B_1 A_1 likewise. Of a convolution the channels are split, and W_2 has the kernel. The rank of the change is the
product of both ranks. With B_2 A_2 it is a LoRA of rank min(p, q) r, `(I ⊗ B_2) (W_1 ⊗ A_2)`, or
`(W_1 ⊗ B_2) (I ⊗ A_2)`.

LyCORIS made an adapter of it: "Navigating Text-To-Image Customization", ICLR 2024, arXiv 2309.14859. Parameters:
p q + r (k + n). Cost for N rows: 2 N q (r (n + k) + out) flops.
"""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from isotune.adapters.contract import Parts, WeightAdapter
from isotune.adapters.settings import Settings
from isotune.linalg.low_rank import at_most_full_rank
from isotune.linalg.precision import autocast
from isotune.linalg.random_bases import uniform
from isotune.linalg.thin import without_autocast
from isotune.sites import CONVOLUTIONS, LINEAR, Site


class LoKr(Settings):
    """W' = W + s W_1 ⊗ W_2: the weight plus a Kronecker product, of factors that may have a low rank."""

    name: ClassVar[str] = "lokr"
    kinds: ClassVar[frozenset[str]] = LINEAR | CONVOLUTIONS
    learning_rate: ClassVar[float] = 1e-2
    formula: ClassVar[str] = "p * q + rank * (k + n)"
    dialect: ClassVar[str] = "isotune.adapters.peft.lycoris:LoKrDialect"
    exempt: ClassVar[dict[str, str]] = {
        "parameter_count_is_as_declared": "p, q, k and n are divisors of n_out and n_in, for which the formula has "
        "no arithmetic; tests/adapters/test_lokr.py compares the count with what is trained"
    }

    rank: int = Field(8, gt=0, description="Rank of the factors that have a low one.")
    alpha: float | None = Field(None, gt=0, description="Scaling numerator; the default is the rank, so that s = 1.")
    factor: int | None = Field(
        None, gt=0, description="Sides of W_1, where they divide; by default those nearest to the square roots."
    )
    both: bool = Field(False, description="Let W_1 have a low rank too, where its sides are above twice the rank.")

    @property
    def resolved_alpha(self) -> float:
        """The scaling numerator, with the default filled in."""
        return self.alpha or float(self.rank)

    def sides(self, site: Site) -> tuple[tuple[int, int], tuple[int, int], int]:
        """(p, q), (k, n) without the kernel, and how many numbers the kernel has for a channel."""
        window = math.prod(site.layer.kernel_size) if site.kind in CONVOLUTIONS else 1
        p, k = split(site.out_features, self.factor)
        q, n = split(site.in_features // window, self.factor)
        return (p, q), (k, n), window

    def build(self, site: Site, generator: torch.Generator) -> LoKrAdapter:
        (p, q), (k, n), window = self.sides(site)
        r, draw = self.rank, lambda *shape: uniform(shape, 1 / math.sqrt(shape[-1]), generator)
        first = [torch.zeros(p, r), draw(r, q)] if self._low(p, q) and self.both else [torch.zeros(p, q)]
        second = [draw(k, r), draw(r, n * window)] if self._low(k, n) else [draw(k, n * window)]
        return LoKrAdapter(first, second, self.resolved_alpha / r)

    def _low(self, one: int, other: int) -> bool:
        return self.rank < max(one, other) / 2

    def parameter_count(self, site: Site) -> int:
        (p, q), (k, n), window = self.sides(site)
        first = self.rank * (p + q) if self._low(p, q) and self.both else p * q
        return first + (self.rank * (k + n * window) if self._low(k, n) else k * n * window)


def split(side: int, factor: int | None) -> tuple[int, int]:
    """Two divisors, the smaller first: as near to the root as goes, or the first one `factor`, or nearly that."""
    if factor is not None and side % factor == 0:
        return factor, side // factor
    most = min(factor or side, math.isqrt(side))
    small = max(divisor for divisor in range(1, most + 1) if side % divisor == 0)
    return small, side // small


class LoKrAdapter(WeightAdapter):
    """Holds W1 (p x q), or B1 and A1, and W2 (k x n), or B2 and A2."""

    method = "lokr"
    parts: Parts = MappingProxyType({"W1": "matrix", "W2": "matrix", "B1": "B", "B2": "B", "A1": "A", "A2": "A"})

    def __init__(self, first: list[Tensor], second: list[Tensor], scale: float = 1.0) -> None:
        super().__init__()
        for number, found in enumerate((first, second), start=1):
            names = (f"W{number}",) if len(found) == 1 else (f"B{number}", f"A{number}")
            for name, tensor in zip(names, found, strict=True):
                self.register_parameter(name, nn.Parameter(tensor))
        self.scale = scale

    def small(self) -> Tensor:
        """s W_1 (p, q)."""
        first = self._product("1")
        return first[0] * self.scale if len(first) == 1 else self.scale * first[0] @ first[1]

    def large(self) -> tuple[Tensor, ...]:
        """W_2 (k, n) by itself, or as B_2 (k, r) and A_2 (r, n)."""
        return self._product("2")

    def _product(self, number: str) -> tuple[Tensor, ...]:
        own = dict(self.named_parameters())
        return tuple(own[name] for name in (f"W{number}", f"B{number}", f"A{number}") if name in own)

    def weight(self, W: Tensor) -> Tensor:
        with without_autocast(W):
            large = self.large()
            return W + torch.kron(self.small(), large[0] if len(large) == 1 else large[0] @ large[1]).to(W.dtype)

    def factors(self, W: Tensor) -> tuple[Tensor, Tensor]:
        first, (B2, *rest) = self.small().to(W.dtype), (t.to(W.dtype) for t in self.large())
        A2 = rest[0] if rest else torch.eye(B2.shape[1], dtype=W.dtype, device=W.device)
        p, q = first.shape
        eye = torch.eye(min(p, q), dtype=W.dtype, device=W.device)
        left, right = (eye, first) if p <= q else (first, eye)
        return at_most_full_rank(torch.kron(left, B2), torch.kron(right, A2))

    def forward(self, x: Tensor, site: Site) -> Tensor:
        if not site.rotates_input:
            return super().forward(x, site)
        x, y = autocast(x), site(x)
        with without_autocast(y):
            first = self.small().to(y.dtype)
            v = x.to(y.dtype).unflatten(-1, (first.shape[1], -1))
            for factor in reversed(self.large()):
                v = v @ factor.to(y.dtype).mT
            return y + (first @ v).flatten(-2)

    def peft_state(self, site: Site) -> dict[str, Tensor]:
        names = {"W1": "lokr_w1", "B1": "lokr_w1_a", "A1": "lokr_w1_b", "W2": "lokr_w2", "B2": "lokr_w2_a",
                 "A2": "lokr_w2_b"}  # fmt: skip
        found = {names[name]: parameter.detach() for name, parameter in self.named_parameters()}
        if site.kind in CONVOLUTIONS and "lokr_w2" in found:
            found["lokr_w2"] = found["lokr_w2"].unflatten(1, (-1, *site.layer.kernel_size))
        return found
