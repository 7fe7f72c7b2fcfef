"""Poly and MHR: an inventory of skills, LoRAs that tasks mix, each in its own way; with several heads part by part.

    A_t = Σ_s w_ts A_s,   B_t = Σ_s w_ts B_s,   W' = W + (alpha / r) B_t A_t,   w_t = σ(z_t) / Σ_s σ(z_ts)

z (T x q x S) holds the logits of T tasks over S skills for each of q heads: with q > 1 the inputs of A and the
outputs of B are cut into q parts, and every part is mixed by itself (MHR). While training w is sampled (relaxed
Bernoulli) or, with `sample=false`, what it is in evaluation. `isotune.use_task(model, tasks)` says of which task
every row of the batch is, or that all are of one: then it is one LoRA of rank r, which folds, exports and generates
as such.

A task that comes later is added with `isotune.add_task(model, "new")`, after which its logits alone train (MHR-z).
`router="uniform"` has no logits, and is trained further as one LoRA, the mean of all skills (MHR-mu).

Papers: "Combining Modular Skills in Multitask Learning", 2022, arXiv 2202.13914; "Multi-Head Adapter Routing for
Cross-Task Generalization", NeurIPS 2023, arXiv 2211.03831. Parameters: S r (in + out) + T q S. Cost: T S r (in + out)
flops to mix, and for n rows 2 n r (in + out). Skills are mixed, and w sampled, once for each task, not for each row.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from isotune.adapters.contract import Parts, Thin, Treatment, WeightAdapter
from isotune.adapters.mixed import Routing, gathered
from isotune.adapters.settings import Settings, check_rank
from isotune.adapters.thin_layer import beside
from isotune.errors import IsotuneError, NoLowRankFormError, OptionError, nearest
from isotune.linalg.random_bases import uniform
from isotune.sites import LINEAR, Site


class Poly(Settings):
    """W' = W + (alpha / r) B_t A_t: for each task t a mix of the same skills."""

    name: ClassVar[str] = "poly"
    kinds: ClassVar[frozenset[str]] = LINEAR
    learning_rate: ClassVar[float] = 5e-3
    formula: ClassVar[str] = "4 * rank * (n_in + n_out) + 4"
    dialect: ClassVar[str] = "isotune.adapters.peft.poly:PolyDialect"

    rank: int = Field(8, gt=0, description="Rank of a skill.")
    skills: int = Field(4, gt=0, description="How many skills there are; the papers' S.")
    heads: int = Field(1, gt=0, description="Parts that are mixed by themselves; above 1 it is MHR.")
    tasks: tuple[str, ...] = Field(("default",), min_length=1, description="Names of the tasks.")
    router: Literal["learned", "uniform"] = Field(
        "learned", description="Logits for every task, or the mean of all skills for all of them."
    )
    sample: bool = Field(True, description="Sample the weights of skills while training.")
    alpha: float = Field(1.0, gt=0, description="Numerator of the scale.")
    router_rate: float = Field(100.0, gt=0, description="Factor on the learning rate for the logits.")

    def build(self, site: Site, generator: torch.Generator) -> PolyAdapter:
        check_rank(self.rank, min(site.in_features, site.out_features), "its smaller side")
        n_in, n_out, q, S = site.in_features, site.out_features, self.heads, self.skills
        if n_in % q or n_out % q:
            raise OptionError(f"{q} heads do not divide a layer of {n_in} inputs and {n_out} outputs evenly")
        if len(set(self.tasks)) < len(self.tasks):
            raise OptionError(f"poly: a task is named twice: {', '.join(self.tasks)}")
        A = uniform((q, S, n_in // q, self.rank), (n_in // q) ** -0.5, generator)
        z = uniform((len(self.tasks), q, S), 1e-3, generator) if self.router == "learned" else None
        return PolyAdapter(A, torch.zeros(q, S, self.rank, n_out // q), z, self)

    def place(self, task: str) -> int:
        """Which of the tasks this one is. Raises OptionError for one that is not there."""
        if task not in self.tasks:
            raise OptionError(
                f"poly has no task {task!r}.{nearest(task, self.tasks)} It has: {', '.join(self.tasks)}."
            )
        return self.tasks.index(task)

    def parameter_count(self, site: Site) -> int:
        logits = len(self.tasks) * self.heads * self.skills if self.router == "learned" and self.skills > 1 else 0
        return self.skills * self.rank * (site.in_features + site.out_features) + logits


class PolyAdapter(WeightAdapter):
    """Holds A (q x S x in/q x r), B (q x S x r x out/q) and z (T x q x S)."""

    method = "poly"
    parts: Parts = MappingProxyType({"A": "matrices", "B": "matrices"})

    def __init__(self, A: Tensor, B: Tensor, z: Tensor | None, settings: Poly) -> None:
        super().__init__()
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.z: Tensor | None
        if z is None or A.shape[1] > 1:
            self.z = None if z is None else nn.Parameter(z)
        else:  # a single skill has a weight of one, whatever its logits are
            self.register_buffer("z", z)
        self.added: nn.Parameter | None = None  # the logits (1, q, S) of a task that came later
        self.settings = settings
        self.scale = settings.alpha / settings.rank
        self.routing: Routing | None = None
        """The task of each row of the batch."""
        self.task: int | None = None
        """That of all rows."""

    @property
    def has_weight(self) -> bool:
        return self._single() is not None

    @property
    def no_weight(self) -> str:
        return (
            "poly mixes its skills by task: say with isotune.use_task(model, tasks) of which task the rows are, or "
            f"which one is meant; it has {', '.join(self.settings.tasks)}"
        )

    def _single(self) -> int | None:
        """The one task that all rows are of, or None."""
        return 0 if len(self.settings.tasks) == 1 or self.z is None else self.task

    def mixing(self, sample: bool) -> Tensor:
        """w (T, q, S)."""
        if self.z is None:
            return torch.full((1, *self.A.shape[:2]), 1 / self.A.shape[1], dtype=self.A.dtype, device=self.A.device)
        z = self.z if self.added is None else torch.cat([self.z, self.added])
        weights = z.sigmoid()
        if sample:
            weights = torch.distributions.RelaxedBernoulli(z.new_ones(()), logits=z).rsample()
        return weights / (weights.sum(-1, keepdim=True) + 1e-12)

    def mixed(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """A_t (n, in, r) and B_t (n, r, out), scaled, for weights w (n, q, S)."""
        A = torch.einsum("nqs,qsdr->nqdr", w, self.A).flatten(1, 2)
        B = torch.einsum("nqs,qsro->nrqo", w, self.B).flatten(2)
        return A, self.scale * B

    def _thin(self, sample: bool = False) -> tuple[Tensor, Tensor]:
        """A_t (in, r) and B_t (r, out) of the one task. Raises IsotuneError where there is none."""
        task = self._single()
        if task is None:
            raise IsotuneError(self.no_weight)
        w = self.mixing(sample)
        A, B = self.mixed(w[task : task + 1] if self.z is not None else w)
        return A[0], B[0]

    def forward(self, x: Tensor, site: Site) -> Tensor:
        sample = self.training and self.settings.sample
        if self._single() is not None or self.routing is None:
            return beside(site, x, *self._thin(sample))
        y = site(x)
        thin = [Thin("beside", *pair) for pair in zip(*self.mixed(self.mixing(sample)), strict=True)]
        return gathered(x.to(y.dtype), y, thin, self.routing.of(x, site))

    def reference(self, x: Tensor, site: Site) -> Tensor:
        if self._single() is not None or self.routing is None:
            return super().reference(x, site)
        A, B = self.mixed(self.mixing(False))
        weights = self.routing.of(x, site).weights.to(A.dtype)
        rows = [v @ torch.tensordot(w, A @ B, 1).to(v.dtype) for v, w in zip(x, weights, strict=True)]
        return site(x) + torch.stack(rows)

    def weight(self, W: Tensor) -> Tensor:
        A, B = self._thin()
        return W + B.mT.to(W.dtype) @ A.mT.to(W.dtype)

    def factors(self, W: Tensor) -> tuple[Tensor, Tensor]:
        if self._single() is None:
            raise NoLowRankFormError(self.no_weight)
        A, B = self._thin()
        return B.mT.to(W.dtype), A.mT.to(W.dtype)

    def thin_factors(self, site: Site) -> Thin | None:
        return None if self._single() is None else Thin("beside", *self._thin())

    def parameter_groups(self) -> dict[str, Treatment]:
        names = [name for name in ("z", "added") if getattr(self, name) is not None]
        return dict.fromkeys(names, Treatment(rate=self.settings.router_rate, decay=0.0))

    def peft_state(self, site: Site) -> dict[str, Tensor]:
        own = {"poly_lora_A": self.A.detach(), "poly_lora_B": self.B.detach()}
        if self.z is None:
            return own
        z = self.z if self.added is None else torch.cat([self.z, self.added])
        return own | {"poly_router.module_logits": z.detach().flatten(1)}
