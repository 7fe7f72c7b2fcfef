"""Orthogonal Adaptation (OrthA): LoRA whose A is frozen to a part of one orthogonal basis that all adapters share.

    W' = W + s B A,   A = Oᵀ[S] (r x in) frozen, A Aᵀ = I,   O = D C (in x in),   S a set of r columns

and s = alpha / r. Adapters trained apart are made to be added: where their sets S are disjoint, A_i A_jᵀ = 0, and
neither change acts on the inputs that the other one reads. C is the orthonormal DCT-II and D a diagonal of random
signs, so that a column of O takes O(in) and O is never formed; C, D and S are the same bits on every machine.

`slot=k` takes the k-th r columns of a shuffled order: disjoint for adapters of one rank, up to in / r of them.
`concept` takes r columns that a hash of the name chooses; two concepts share r² / in of them on average. With
neither, the adapter's seed draws them. The paper's other construction, "gaussian", has independent N(0, 1 / in).

Paper: "Orthogonal Adaptation for Modular Customization of Diffusion Models", CVPR 2024, arXiv 2312.02432 (its A is
our B, and its B our Aᵀ; the basis of cosines and the slots are ours). Parameters: r out. Cost for n rows:
2 n r (in + out) flops. On disk it is a plain LoRA, A included; PEFT would train that on with A free. An embedding is
left out: its inputs are single tokens, all of which every adapter would change.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from isotune.adapters.contract import Adapter
from isotune.adapters.low_rank.lora import LoRA, LoRAAdapter
from isotune.adapters.settings import check_rank
from isotune.errors import OptionError
from isotune.linalg.dct import dct_columns
from isotune.linalg.hashed import Key, normal, permutation, signs
from isotune.sites import CONVOLUTIONS, LINEAR, Site


class OrthA(LoRA):
    """W' = W + s B A, with A frozen to a part of a shared orthogonal basis, for adapters that are to be merged."""

    name: ClassVar[str] = "ortha"
    kinds: ClassVar[frozenset[str]] = LINEAR | CONVOLUTIONS
    formula: ClassVar[str] = "rank * n_out"
    exempt: ClassVar[dict[str, str]] = {
        "seeds_decide_the_start": "with a slot or a concept, A is the same for every seed: that is its purpose"
    }

    basis_seed: int = Field(0, ge=0, description="Seed of the basis; the same for all adapters to be merged.")
    slot: int | None = Field(
        None, ge=0, description="Which part of the basis to take, counted from 0; another one for each adapter."
    )
    concept: str | None = Field(
        None,
        min_length=1,
        description="A name that chooses the part of the basis by its hash, where there is no slot.",
    )
    construction: Literal["orthogonal", "gaussian"] = Field(
        "orthogonal", description="Rows of A from the orthogonal basis, or with random entries from N(0, 1 / in)."
    )

    def part(self) -> Key | None:
        """What decides which part of the basis the adapter has; None where the adapter's seed does."""
        if self.slot is not None:
            return "slot", self.slot
        return None if self.concept is None else ("concept", self.concept)

    def columns(self, n_in: int, part: Key) -> Tensor:
        """The set S (r) at a layer with `n_in` inputs, of the "orthogonal" construction."""
        if part[0] == "slot":
            first = int(part[1]) * self.rank
            return permutation(n_in, ("ortha", self.basis_seed, n_in))[first : first + self.rank]
        return permutation(n_in, ("ortha", self.basis_seed, n_in, *part))[: self.rank]

    def frozen(self, n_in: int, part: Key) -> Tensor:
        """A (r, in), in fp32."""
        key = "ortha", self.basis_seed, n_in
        if self.construction == "gaussian":
            return (normal((self.rank, n_in), (*key, "gaussian", *part)) / math.sqrt(n_in)).float()
        return (dct_columns(n_in, self.columns(n_in, part)) * signs(n_in, (*key, "signs"))).float()

    def build(self, site: Site, generator: torch.Generator) -> Adapter:
        self._check_fit(site)
        part = self.part() or ("drawn", int(torch.randint(2**62, (), generator=generator)))
        B = torch.zeros(site.out_features, self.rank)
        return self.adapter(self.frozen(site.in_features, part), B, site)

    def shell(self, site: Site) -> Adapter:
        self._check_fit(site)
        return super().shell(site)

    def check(self, site: Site) -> None:
        self._check_fit(site)

    def _check_fit(self, site: Site) -> None:
        check_rank(self.rank, min(site.in_features, site.out_features), "its smaller side")
        slots = site.in_features // self.rank
        if self.slot is not None and self.slot >= slots and self.construction == "orthogonal":
            raise OptionError(
                f"slot {self.slot} of rank {self.rank} needs {(self.slot + 1) * self.rank} inputs, and the layer has "
                f"{site.in_features}, which are {slots} slots; take a slot below {slots} or a smaller rank, leave "
                "the layer out, or let a concept choose, at the price of some overlap"
            )

    def adapter(self, A: Tensor, B: Tensor, site: Site) -> Adapter:
        return OrthAAdapter(A, B, self.scale, self.dropout)

    def parameter_count(self, site: Site) -> int:
        return self.rank * site.out_features


class OrthAAdapter(LoRAAdapter):
    """Holds B (out x r) and, frozen, A (r x in)."""

    method = "ortha"

    def __init__(self, A: Tensor, B: Tensor, scale: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__(A, B, scale, dropout)
        del self.A
        self.register_buffer("A", A)
