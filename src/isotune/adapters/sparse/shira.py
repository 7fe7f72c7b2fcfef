"""SHiRA, sparse high-rank adapter: a few entries of the weight train, at random, fixed positions.

    W' = W + S,   S (out x in) zero but for r (in + out) entries, as many numbers as a LoRA of rank r has

The rank of the change is not bounded by r. Layers of one shape have the same positions, those that PEFT draws from
the same seed; files hold both.

Paper: "Sparse High Rank Adapters", NeurIPS 2024, arXiv 2406.13175. Parameters: r (in + out). Cost for n rows: 2 n r
(in + out) flops of gathers and sums, or in out for the weight, whichever is cheaper; no gradient of the weight's size
where it is the first.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from isotune.adapters.contract import check_tensors
from isotune.adapters.settings import Settings
from isotune.adapters.spectral.sparse_spectrum import SparseSpectrum
from isotune.errors import OptionError
from isotune.linalg.sparse import drawn_cells, scattered, sparse_product
from isotune.sites import CONVOLUTIONS, LINEAR, Site


class SHiRA(Settings):
    """W' = W + S: a few entries of the weight, at random positions, train."""

    name: ClassVar[str] = "shira"
    kinds: ClassVar[frozenset[str]] = LINEAR | CONVOLUTIONS
    learning_rate: ClassVar[float] = 5e-3
    formula: ClassVar[str] = "rank * (n_in + n_out)"
    dialect: ClassVar[str] = "isotune.adapters.peft.shira:SHiRADialect"
    exempt: ClassVar[dict[str, str]] = {
        "seeds_decide_the_start": "it starts from zeros, at positions that its own option `seed` draws, as in PEFT"
    }

    rank: int = Field(8, gt=0, description="As many entries train as a LoRA of this rank has numbers.")
    seed: int = Field(0, ge=0, le=2**63 - 1, description="Seed of the positions, for all layers.")

    def build(self, site: Site, generator: torch.Generator) -> SHiRAAdapter:
        self.check(site)
        cells = drawn_cells(self.parameter_count(site), site.in_features * site.out_features, self.seed)
        return SHiRAAdapter(torch.zeros(len(cells)), cells.sort().values, site.in_features)

    def check(self, site: Site) -> None:
        n_in, n_out = site.in_features, site.out_features
        if self.rank * (n_in + n_out) > n_in * n_out:
            most = n_in * n_out // (n_in + n_out)
            raise OptionError(
                f"rank {self.rank} stands for {self.rank * (n_in + n_out)} entries, and the layer's weight has "
                f"{n_in * n_out}; " + (f"choose a rank of at most {most}" if most else "it is too small for shira")
            )

    def parameter_count(self, site: Site) -> int:
        return self.rank * (site.in_features + site.out_features)


class SHiRAAdapter(SparseSpectrum):
    """Holds the values (k) of the entries that train, their rows (k) and their columns (k)."""

    method = "shira"
    rows: Tensor
    cols: Tensor

    def __init__(self, values: Tensor, cells: Tensor, n_in: int) -> None:
        super().__init__()
        self.values = nn.Parameter(values)
        self.register_buffer("rows", cells // n_in, persistent=False)
        self.register_buffer("cols", cells % n_in, persistent=False)

    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.rows, self.cols, self.values

    def dense_change(self, shape: tuple[int, int]) -> Tensor:
        rows, cols, values = self.entries()
        return scattered(values, rows, cols, shape)

    def change_of(self, x: Tensor, n_out: int) -> Tensor:
        rows, cols, values = self.entries()
        return sparse_product(x, values, rows, cols, n_out)

    def transform_price(self, n: int) -> float:
        return 0.0  # the entries are the weight's own

    def peft_state(self, site: Site) -> dict[str, Tensor]:
        return {"shira_weight": self.values.detach(), "shira_indices": torch.stack([self.rows, self.cols]).int()}

    def load_peft_state(self, tensors: dict[str, Tensor], site: Site) -> None:
        check_tensors(tensors, {"shira_weight": (len(self.values),), "shira_indices": (2, len(self.values))})
        rows, cols = tensors["shira_indices"].long()
        inside = (rows >= 0) & (rows < site.out_features) & (cols >= 0) & (cols < site.in_features)
        if not bool(inside.all()):
            raise ValueError(f"shira_indices has places outside of {site.out_features} x {site.in_features}")
        for own, found in ((self.values, tensors["shira_weight"]), (self.rows, rows), (self.cols, cols)):
            own.detach().copy_(found)
