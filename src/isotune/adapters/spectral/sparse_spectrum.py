"""Changes whose spectrum has few entries, `W' = W + Y S X`: transform the layer's rows, or form the weight.

S (out x in) holds k learned entries; X and Yᵀ transform rows of length in and out in O(n log n). Two equal forms, for
n rows and a training step:

    rows     y = x Wᵀ + ((x Xᵀ) Sᵀ) Yᵀ    transforms of n rows, and k products for each
    weight   y = x (W + Y S X)ᵀ            one transform of the weight, and its gradient: 2 n in out flops

Both are bound by memory more than by flops, and priced as in `linalg.forms`: to gather, multiply and add an entry of
S costs about ten numbers, and an FFT runs at a tenth of a product's speed.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from isotune.adapters.contract import WeightAdapter
from isotune.errors import OptionError
from isotune.linalg.forms import FLOPS_PER_NUMBER
from isotune.linalg.precision import at_least_fp32
from isotune.linalg.thin import without_autocast
from isotune.sites import Site

MOST = 1000  # entries of a layer, unless told otherwise


def entry_count(asked: int | None, n_in: int, n_out: int) -> int:
    """The number of entries, with the default filled in. Raises OptionError where it is larger than the weight."""
    cells = n_in * n_out
    if asked is not None and asked > cells:
        raise OptionError(
            f"n_frequency={asked} is larger than the layer: its weight has {n_out} x {n_in} = {cells} entries; "
            f"choose at most {cells}"
        )
    return min(MOST, cells) if asked is None else asked


class SparseSpectrum(WeightAdapter):
    """`W' = W + Y S X`, with S (out x in) given by its entries."""

    @abstractmethod
    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rows, columns and values of the n entries of S, shape (n) each; values at one place add up."""

    @abstractmethod
    def dense_change(self, shape: tuple[int, int]) -> Tensor:
        """`Y S X`, shape (out, in)."""

    @abstractmethod
    def change_of(self, x: Tensor, n_out: int) -> Tensor:
        """`x (Y S X)ᵀ` for rows x (n, in) in fp32 or better: (n, out)."""

    def weight(self, W: Tensor) -> Tensor:
        with without_autocast(W):
            return (at_least_fp32(W) + self.dense_change((W.shape[0], W.shape[1]))).to(W.dtype)

    def forward(self, x: Tensor, site: Site) -> Tensor:
        if not (site.rotates_input and (site.packed or self._rows_are_cheaper(x, site))):
            return super().forward(x, site)
        y = site(x)
        with without_autocast(x):
            change = self.change_of(at_least_fp32(x).reshape(-1, x.shape[-1]), site.out_features)
        return y + change.view(y.shape).to(y.dtype)

    def _rows_are_cheaper(self, x: Tensor, site: Site) -> bool:
        n, k = site.rows(x), sum(p.numel() for p in self.parameters())
        n_in, n_out = site.in_features, site.out_features
        training = torch.is_grad_enabled()
        passes = 3 if training else 1
        each = self.transform_price(n_in) + self.transform_price(n_out) + 10 * FLOPS_PER_NUMBER * k
        once = (
            n_out * self.transform_price(n_in) + n_in * self.transform_price(n_out) + FLOPS_PER_NUMBER * n_in * n_out
        )
        return passes * n * each <= passes * once + (2 * n * n_in * n_out if training else 0)

    def transform_price(self, n: int) -> float:
        """Of one row of length n."""
        return n * (40 * math.log2(n) + FLOPS_PER_NUMBER)
