"""What DoRA and DoRAN share: a low-rank change, and then every row of the weight brought to a learned length.

    W' = diag(c) (W + s B A),   c_i a function of |w_i + s b_i A|

The row lengths come from `linalg.low_rank.row_squares_of_sum`, without B A; |w_i|² is kept as long as W stays as it
is.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from isotune.adapted_site import AdaptedSite
from isotune.adapters.cache import Kept
from isotune.adapters.contract import Constants, WeightAdapter
from isotune.adapters.low_rank.lora import LoRAAdapter
from isotune.adapters.once import Once
from isotune.linalg.autograd import transformed
from isotune.linalg.low_rank import row_squares, row_squares_of_sum, safe_norms
from isotune.linalg.precision import at_least_fp32
from isotune.linalg.thin import without_autocast
from isotune.sites import Site


class RowScaledAdapter(WeightAdapter):
    """Holds the product s B A, and the magnitude m (out) that the rows are scaled to."""

    def __init__(self, product: LoRAAdapter, magnitude: Tensor, detach_norm: bool = True) -> None:
        super().__init__()
        self.product = product
        self.magnitude = nn.Parameter(magnitude)
        self.detach_norm = detach_norm
        self._squares: Kept[Tensor] = Kept()
        self._once = Once()

    @abstractmethod
    def scaling(self, norms: Tensor) -> Tensor:
        """c (out), from the lengths (out) of the rows of W + s B A."""

    def forward(self, x: Tensor, site: Site) -> Tensor:
        # In low precision c rounds to 1 where c - 1 does not round to 0.
        if isinstance(site, AdaptedSite):  # whose weight has parameters of its own
            c = self._scaling_at(site)
        else:
            c = self._once.get(self, lambda: (self._scaling_at(site),))[0]
        excess, y = c - 1, self.product(x, site)
        with without_autocast(y):
            return site.over_outputs(y, lambda y: torch.addcmul(y, y, excess.to(y.dtype)))

    def weight(self, W: Tensor) -> Tensor:
        V = self.product.weight(W)
        rows = at_least_fp32(V.detach() if self.detach_norm else V)
        norms = safe_norms(row_squares(rows), row_squares(at_least_fp32(W)))
        return self.scaling(norms)[:, None].to(V.dtype) * V

    def constants(self, x: Tensor, site: Site) -> Constants | None:
        made = self.product.constants(x, site)
        return made and made._replace(excess=self._scaling_at(site) - 1)

    def _scaling_at(self, site: Site) -> Tensor:
        W = site.weight
        if site.packed or isinstance(site, AdaptedSite) or transformed():
            squares = row_squares(W)
        else:
            squares = self._squares.get((site.parameter,), lambda: row_squares(W))
        B, A = (t.to(squares.dtype) for t in self.product.change())
        with without_autocast(W):
            if self.detach_norm:
                W, B, A, squares = W.detach(), B.detach(), A.detach(), squares.detach()
            return self.scaling(safe_norms(row_squares_of_sum(W, B, A, squares), squares))
