"""SPLoPA, structured pruning with shared prototypes: blocks of the weight take from them, or are left out.

    W' = (W + Σ_k P_k ⊗ (c_k r_kᵀ)) ∘ (M ⊗ 1),   c_k (p), r_k (q) shared by all layers, P_k and M (out/p x in/q)

for k = 1 ... K: P_k says how much of the k-th prototype each block of p x q takes, and M in {0, 1} which blocks are
left. A block is worth the p-norm of its entries in the adapted weight; over the training, as `sparse/schedule.py`
says, those that are worth least, over all layers together, are left out for good. Where p and q do not divide a
layer, its last blocks are cut off at its edge. c starts at zero, so that the model is unchanged at first; the paper's
start is `init_range=1e-4`. In the authors' code prototypes belong to the process, so that two models share them; here
they belong to the adapter. A layer without some blocks is no smaller layer: `isotune.slim` is for channels.

Paper: "Structured Pruning Adapters", 2022, arXiv 2211.10155 (low-rank PHM adapters). Parameters: K (p + q) in all and
K ceil(out/p) ceil(in/q) for each layer, of which those of blocks that are left are stored. Cost: 2 K in out flops in
each pass, for W' itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from isotune.adapters.contract import Parts, WeightAdapter, check_tensors
from isotune.adapters.settings import by_schedule
from isotune.adapters.shared import Shared
from isotune.adapters.sparse.schedule import StructuredPruning
from isotune.linalg.precision import at_least_fp32
from isotune.linalg.random_bases import uniform
from isotune.linalg.sparse import largest_of_all, packed_bits, unpacked_bits
from isotune.sites import LINEAR, Site


class SPLoPA(StructuredPruning):
    """W' = (W + Σ_k P_k ⊗ (c_k r_kᵀ)) ∘ (M ⊗ 1): blocks that take from shared prototypes, or are left out."""

    name: ClassVar[str] = "splopa"
    kinds: ClassVar[frozenset[str]] = LINEAR
    learning_rate: ClassVar[float] = 1e-2
    formula: ClassVar[str] = "64 * ceil(n_in / 32) * ceil(n_out / 32)"
    trains_shared: ClassVar[bool] = True
    size_option: ClassVar[str | None] = "prototypes"
    exempt: ClassVar[dict[str, str]] = {
        "dtype_is_kept": "W decides which blocks are left, and rounded it may decide otherwise; "
        "tests/adapters/test_splopa.py has the law with all blocks left",
    }

    prototypes: int = Field(64, gt=0, description="How many prototypes there are; the paper's K.")
    block_rows: int = Field(32, gt=0, description="Rows of a block; the paper's p.")
    block_columns: int = Field(32, gt=0, description="Columns of a block; the paper's q.")
    init_range: float = Field(0.0, ge=0, le=0.01, description="c starts within these bounds; zero: as the base.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of the prototypes.")

    @property
    def identity_at_start(self) -> bool:
        return self.init_range == 0

    def blocks(self, site: Site) -> tuple[int, int]:
        """How many blocks lie in a column of blocks, and in a row of them."""
        return -(-site.out_features // self.block_rows), -(-site.in_features // self.block_columns)

    def shared(self, sites: Iterable[Site]) -> dict[str, Tensor]:
        draw, K = torch.Generator().manual_seed(self.seed), self.prototypes
        r = uniform((K, self.block_columns), self.block_columns**-0.5, draw)
        return {"splopa_c": uniform((K, self.block_rows), self.init_range, draw), "splopa_r": r}

    def build(self, site: Site, generator: torch.Generator) -> SPLoPAAdapter:
        return SPLoPAAdapter(uniform((self.prototypes, *self.blocks(site)), self.prototypes**-0.5, generator), self)

    def parameter_count(self, site: Site) -> int:
        rows, columns = self.blocks(site)
        return self.prototypes * rows * columns


class SPLoPAAdapter(WeightAdapter):
    """Holds P (K x out/p x in/q) and M (out/p x in/q)."""

    method = "splopa"
    parts: Parts = MappingProxyType({"P": "matrices"})
    M: Tensor

    def __init__(self, P: Tensor, settings: SPLoPA) -> None:
        super().__init__()
        self.P, self.settings = nn.Parameter(P), settings
        self.register_buffer("M", torch.ones(P.shape[1:], dtype=torch.bool))

    def share(self, shared: Shared) -> None:
        self.shared, K = shared, self.settings.prototypes
        p, q = self.settings.block_rows, self.settings.block_columns
        check_tensors(shared.tensors(), {"splopa_c": (K, p), "splopa_r": (K, q)})

    def change(self) -> Tensor:
        """Σ_k P_k ⊗ (c_k r_kᵀ), with whole blocks at the edges: one product of P (K, blocks) and (K, p q)."""
        c, r = self.shared["splopa_c"], self.shared["splopa_r"]
        (rows, columns), p, q = self.M.shape, c.shape[1], r.shape[1]
        D = self.P.flatten(1).mT @ (c[:, :, None] * r[:, None, :]).flatten(1)
        return D.view(rows, columns, p, q).transpose(1, 2).reshape(rows * p, columns * q)

    def weight(self, W: Tensor) -> Tensor:
        out, n_in = W.shape
        p, q = self.settings.block_rows, self.settings.block_columns
        left = self.M.repeat_interleave(p, 0)[:out].repeat_interleave(q, 1)[:, :n_in]
        return (W + self.change()[:out, :n_in].to(W.dtype)) * left

    def worth(self, site: Site) -> Tensor:
        """What each block is worth, (out/p, in/q): the sum of |w'|^p over its entries."""
        W = self.weight(at_least_fp32(site.weight)).abs().pow(self.settings.p)
        (rows, columns), p, q = self.M.shape, self.settings.block_rows, self.settings.block_columns
        W = nn.functional.pad(W, (0, columns * q - W.shape[1], 0, rows * p - W.shape[0]))
        return W.view(rows, p, columns, q).sum((1, 3)).masked_fill(~self.M, -1.0)

    @classmethod
    def after_steps(cls, adapters: Mapping[Self, Site], progress: float) -> Sequence[nn.Parameter]:
        for group in by_schedule(adapters):
            count = group[0].settings.left(progress, sum(adapter.M.numel() for adapter in group))
            if count < sum(int(adapter.M.sum()) for adapter in group):
                masks = largest_of_all([adapter.worth(adapters[adapter]) for adapter in group], count)
                for adapter, mask in zip(group, masks, strict=True):
                    adapter.M.copy_(mask)
        for adapter in adapters:
            adapter.P.data.mul_(adapter.M)
        return ()

    def peft_state(self, site: Site) -> dict[str, Tensor]:
        return {"splopa_P": self.P.detach()[:, self.M], "splopa_left": packed_bits(self.M)}

    def load_peft_state(self, tensors: dict[str, Tensor], site: Site) -> None:
        found = tensors.get("splopa_left")
        if found is not None and found.numel() == packed_bits(self.M).numel():
            self.M.copy_(unpacked_bits(found, self.M.shape))
        own = self.peft_state(site)
        check_tensors(tensors, {name: tuple(tensor.shape) for name, tensor in own.items()})
        self.P.detach().zero_()[:, self.M] = tensors["splopa_P"].to(self.P)
