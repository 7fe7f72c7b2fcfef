"""SHOFT, scaled Householder orthogonal fine-tuning: HOFT with a learned magnitude for each output in between.

    W' = Q_U diag(m) W Q_V

with Q_U and Q_V as in `orthogonal.hoft` and m (out), which starts at one. Only m can change the singular values.

Paper: "HOFT: Householder Orthogonal Fine-tuning", 2025, arXiv 2505.16531. Parameters: r (in + out) + out.
Cost for n rows: HOFT's and n out flops. It has no low-rank form: diag(m) - I has full rank.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from isotune.adapters.orthogonal.hoft import HOFT
from isotune.adapters.orthogonal.two_sided import OutputScale, TwoSided
from isotune.sites import Site


class SHOFT(HOFT):
    """W' = Q_U diag(m) W Q_V: HOFT with a learned scale of each output between the two products."""

    name: ClassVar[str] = "shoft"
    learning_rate: ClassVar[float] = 1e-2
    formula: ClassVar[str] = "rank * (n_in + n_out) + n_out"

    def build(self, site: Site, generator: torch.Generator) -> SHOFTAdapter:  # type: ignore[override]
        return SHOFTAdapter(*self._sides(site, generator), OutputScale(torch.ones(site.out_features)))

    def parameter_count(self, site: Site) -> int:
        return super().parameter_count(site) + site.out_features


class SHOFTAdapter(TwoSided):
    """Holds V (in x r), U (out x r) and m (out)."""

    method = "shoft"
