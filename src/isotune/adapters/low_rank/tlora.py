"""TLoRA, transformed low-rank adaptation: a learned transform of the weight's input side, and a small residual.

    W' = W T + Δ,   T[i, j] = tr(A_1[i_1, j_1] ... A_D[i_D, j_D]),
                    Δ[i, j] = tr(B_1[i_1] ... B_D[i_D] C_1[j_1] ... C_D[j_D])

Both are tensor rings over the digits of the indices: in = Π I_d and out = Π J_d, factors as equal as their primes
allow; A_d is (I_d x I_d x t x t), B_d (J_d x r x r), C_d (I_d x r x r). T has full rank and starts as the identity,
A_d[:, :, a, b] = P_d[a, b] I; Δ starts as zero, B_1 = 0, and has rank at most r². In the paper all P_d[a, b] = 1/t.
From there the entries of a ring have equal gradients and stay equal, so that T keeps ring rank 1; `spread` draws
them apart, with tr(P_1 ... P_D) = 1 as before.

Paper: "Transformed Low-rank Adaptation via Tensor Decomposition and Its Applications to Text-to-image Models",
ICCV 2025, arXiv 2501.08727. Parameters: t² Σ I_d² + r² Σ (I_d + J_d). Cost for n rows: about 2 n in t³ Σ I_d flops
for T, or out rows in place of n where W T is formed, and 2 n r² (in + out) for Δ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from isotune.adapters.contract import WeightAdapter
from isotune.adapters.settings import Settings
from isotune.linalg.forms import FLOPS_PER_NUMBER
from isotune.linalg.precision import at_least_fp32
from isotune.linalg.tensor_ring import digit_sizes, ring_flops, ring_products, ring_rows
from isotune.linalg.thin import thin_add, without_autocast
from isotune.sites import CONVOLUTIONS, LINEAR, Site

Regularizer = Literal["identity", "orthogonal"]


class TLoRA(Settings):
    """W' = W T + Δ: the weight times a tensor ring near the identity, plus a tensor ring of low rank."""

    name: ClassVar[str] = "tlora"
    kinds: ClassVar[frozenset[str]] = LINEAR | CONVOLUTIONS
    learning_rate: ClassVar[float] = 3e-3
    formula: ClassVar[str] = "transform_rank**2 * sum(I**2) + rank**2 * (sum(I) + sum(J))"
    exempt: ClassVar[dict[str, str]] = {
        "parameter_count_is_as_declared": "the cores' sizes I and J are factors of n_in and n_out, for which the "
        "formula has no arithmetic; tests/adapters/test_tlora.py compares the count with what is trained"
    }

    rank: int = Field(4, gt=0, description="Ring rank r of the residual; its matrix rank is at most r².")
    transform_rank: int = Field(2, gt=0, le=16, description="Ring rank t of the transform.")
    digits: int = Field(3, gt=0, le=8, description="Number D of factors of each side, and of cores of each ring.")
    spread: float = Field(
        0.1, ge=0, le=0.5, description="How far the transform's ring starts from equal entries; 0 as in the paper."
    )
    penalty: float = Field(0.0, ge=0, description="Weight of the regulariser on the transform's cores.")
    regularizer: Regularizer = Field(
        "identity", description="Keep the cores near their start, or T near an orthogonal matrix."
    )

    def build(self, site: Site, generator: torch.Generator) -> TLoRAAdapter:
        into, out = self._sizes(site.in_features, site.out_features)
        P = 1 + self.spread * (2 * torch.rand(self.digits, *2 * [self.transform_rank], generator=generator) - 1)
        P /= self.transform_rank
        P[-1] /= (P[0] if self.digits == 1 else torch.linalg.multi_dot([*P])).trace()
        A = [torch.eye(size)[:, :, None, None] * p for size, p in zip(into, P, strict=True)]
        B, C = ([self._normal(size, generator) for size in sizes] for sizes in (out, into))
        B[0].zero_()
        return TLoRAAdapter(A, B, C, P, self.penalty, self.regularizer)

    def _normal(self, size: int, generator: torch.Generator) -> Tensor:
        """A core (size x r x r) of the scale √n_out / n_in that muP gives a map from n_in = size r to n_out = r."""
        return torch.randn(size, self.rank, self.rank, generator=generator) / (size * math.sqrt(self.rank))

    def parameter_count(self, site: Site) -> int:
        into, out = self._sizes(site.in_features, site.out_features)
        return self.transform_rank**2 * sum(size**2 for size in into) + self.rank**2 * (sum(into) + sum(out))

    def _sizes(self, n_in: int, n_out: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return digit_sizes(n_in, self.digits), digit_sizes(n_out, self.digits)


class TLoRAAdapter(WeightAdapter):
    """Holds the cores A (transform), B and C (residual), and P (D x t x t, frozen), the start of A."""

    method = "tlora"
    P: Tensor

    def __init__(
        self,
        A: Sequence[Tensor],
        B: Sequence[Tensor],
        C: Sequence[Tensor],
        P: Tensor,
        penalty: float = 0.0,
        regularizer: Regularizer = "identity",
    ) -> None:
        super().__init__()
        self.A, self.B, self.C = nn.ParameterList(A), nn.ParameterList(B), nn.ParameterList(C)
        self.register_buffer("P", P)
        self.weight_of_penalty, self.regularizer = penalty, regularizer

    def residual(self) -> tuple[Tensor, Tensor]:
        """Δ as a product of (out x r²) and (r² x in): the ring is cut in two places."""
        return ring_products(self.cores(self.B)).flatten(1), ring_products(self.cores(self.C)).mT.flatten(1).mT

    def weight(self, W: Tensor) -> Tensor:
        with without_autocast(W):
            B, C = self.residual()
            return (ring_rows(at_least_fp32(W), self.cores(self.A), transpose=True) + B @ C).to(W.dtype)

    def cores(self, found: nn.ParameterList) -> list[Tensor]:
        """The cores of one ring, (I_d, ..., r, r) each; by name, which every version of torch.compile traces."""
        return [getattr(found, str(d)) for d in range(len(self.P))]

    def forward(self, x: Tensor, site: Site) -> Tensor:
        if not (site.rotates_input and (site.packed or self._rows_are_cheaper(x, site))):
            return super().forward(x, site)
        with without_autocast(x):
            transformed = ring_rows(at_least_fp32(x).reshape(-1, x.shape[-1]), self.cores(self.A)).view(x.shape)
        y = site(transformed.to(x.dtype))
        B, C = self.residual()
        return thin_add(x.to(y.dtype), C.mT.to(y.dtype), B.mT.to(y.dtype), y)

    def _rows_are_cheaper(self, x: Tensor, site: Site) -> bool:
        """Whether to transform the rows of x and not the rows of W, by flops and numbers as in `linalg.forms`."""
        n, n_in, n_out = site.rows(x), site.in_features, site.out_features
        training = torch.is_grad_enabled()
        ring = ring_flops(self.cores(self.A)) + FLOPS_PER_NUMBER * len(self.P) * n_in * self.P.shape[-1] ** 2
        # W' has a gradient of its own size; so have the transformed rows, which the layer passes on.
        weight = 2 * n * n_in * n_out if training else 0
        rows = weight if not x.requires_grad else 0
        passes = 3 if training else 1
        return passes * n * ring + rows <= passes * n_out * ring + weight + FLOPS_PER_NUMBER * n_in * n_out

    def penalty(self, site: Site) -> Tensor:
        if not self.weight_of_penalty:
            return super().penalty(site)
        terms = [self._distance(core, p) for core, p in zip(self.A, self.P, strict=True)]
        return self.weight_of_penalty * torch.stack(terms).sum()

    def _distance(self, core: Tensor, p: Tensor) -> Tensor:
        """How far a core is from its start: in itself, or in the core of T Tᵀ that it stands for."""
        eye = torch.eye(core.shape[0], dtype=core.dtype, device=core.device)[:, :, None, None]
        if self.regularizer == "identity":
            return torch.linalg.vector_norm(core - eye * p, dim=(0, 1)).sum()
        gram = torch.einsum("ilab,jlcd->ijacbd", core, core).flatten(4).flatten(2, 3)
        return torch.linalg.vector_norm(gram - eye * torch.kron(p, p), dim=(2, 3)).sum()
