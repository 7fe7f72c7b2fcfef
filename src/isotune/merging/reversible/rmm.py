"""Reversible model merging: a few basis models for each layer, from which every adapter comes back by name.

    [x_1 | ... | x_T] ≈ M C,   x_i the same row of B (or column of A) in all T adapters,   M (r x p), C (p x T)

M and C are the best p dimensions of that row (singular value decomposition), once the factors of all adapters are in
one gauge. `isotune.merging.reversible.adapters` has it for Python. Paper: "Towards Reversible Model
Merging For Low-rank Weights", 2025, arXiv 2510.14163.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from isotune.merging.contract import Job
from isotune.merging.record import CompressedAdapters
from isotune.merging.reversible.adapters import compress_adapters


class RMM(Job):
    """Many adapters as a few basis models; `isotune recover` gives any of them back."""

    name: ClassVar[str] = "rmm"
    takes = "adapters"
    unweighted = "rule rmm keeps every adapter as it is; weights have no meaning for it"

    basis: int | None = Field(None, ge=1, description="Basis models for each layer; 2 where no tolerance is given.")
    tolerance: float | None = Field(
        None, gt=0, lt=1, description="Largest relative error of a layer, in place of basis."
    )
    granularity: Literal["position", "layer"] = Field(
        "position", description="Coefficients for each row and column of the factors, or for each layer."
    )
    center: bool = Field(False, description="Take the mean adapter as one of the basis models.")
    align: bool = Field(True, description="Bring the factors of all adapters into one gauge first.")

    def run(
        self, models: Sequence[Path], output: Path, names: Sequence[str] | None, base: str | None, progress: bool
    ) -> CompressedAdapters:
        return compress_adapters(models, output, names, base=base, progress=progress, **self.model_dump())
