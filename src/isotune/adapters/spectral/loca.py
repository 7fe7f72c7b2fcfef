"""LoCA, location-aware cosine adaptation: learned cosine coefficients at locations that are learned, too.

    W' = W + s C_outᵀ S C_in,   S (out x in) zero but S[l_1k, l_2k] = a_k,   C the orthonormal DCT-II matrix

The k-th location is rounded from θ_k in [0, 1]²: l_1 = round(θ_1 (out - 1)), l_2 = round(θ_2 (in - 1)). With
K = dL/dS, the gradient of l_1 is a finite difference, `clamp(a_k (K[l_1 + 1, l_2] - K[l_1 - 1, l_2]) / 2, -1, 1)`,
and that of l_2 likewise. The first `location_steps` optimizer steps go in cycles of 30, 10 for the coefficients and
20 for the locations, which rest afterwards. What rests gets no gradient. `isotune.after_step` moves the schedule on.

Paper: "LoCA: Location-Aware Cosine Adaptation for Parameter-Efficient Fine-Tuning", ICLR 2025, arXiv 2502.06820.
Parameters: n, and 2 n more while locations are learned. Cost for N rows: two fast transforms and 2 n flops for each
row, O(N (in log in + out log out + n)), five times n while locations move, or one 2-D transform of the weight.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from isotune.adapters.contract import Treatment
from isotune.adapters.settings import Settings
from isotune.adapters.spectral.sparse_spectrum import SparseSpectrum, entry_count
from isotune.errors import OptionError
from isotune.linalg.autograd import Node
from isotune.linalg.dct import dct, idct
from isotune.linalg.sparse import scattered, sparse_product
from isotune.sites import CONVOLUTIONS, LINEAR, Site

_CYCLE, _COEFFICIENTS = 30, 10  # steps of a cycle, and those of them that go to the coefficients

Phase = Literal["coefficients", "locations"]


class LoCA(Settings):
    """W' = W + s C_outᵀ S C_in: a change with few cosine coefficients, at learned places."""

    name: ClassVar[str] = "loca"
    kinds: ClassVar[frozenset[str]] = LINEAR | CONVOLUTIONS
    learning_rate: ClassVar[float] = 1e-2
    size_option: ClassVar[str | None] = "n_frequency"
    formula: ClassVar[str] = "1000"

    n_frequency: int | None = Field(
        None, gt=0, description="Number of coefficients; by default 1000, or as many as a smaller weight has."
    )
    scale: float = Field(1.0, gt=0, description="The factor s on the change.")
    location_steps: int = Field(
        0,
        ge=0,
        description="Steps in which locations are learned, too: the paper takes a tenth of all; 0 keeps them.",
    )
    location_rate: float = Field(0.02, gt=0, description="The locations' learning rate, as a factor on the others'.")

    @model_validator(mode="after")
    def _steps_hold_a_cycle(self) -> LoCA:
        if 0 < self.location_steps < _CYCLE:
            raise OptionError(
                f"loca: location_steps={self.location_steps} is less than one cycle of {_CYCLE} steps, of which the "
                f"coefficients have the first {_COEFFICIENTS}; use at least {_CYCLE}, or 0 for fixed locations"
            )
        return self

    def build(self, site: Site, generator: torch.Generator) -> LoCAAdapter:
        n = entry_count(self.n_frequency, site.in_features, site.out_features)
        locations = torch.rand(2, n, generator=generator)
        size = (site.out_features, site.in_features)
        return LoCAAdapter(torch.zeros(n), locations, size, self.scale, self.location_steps, self.location_rate)

    def parameter_count(self, site: Site) -> int:
        return (3 if self.location_steps else 1) * entry_count(self.n_frequency, site.in_features, site.out_features)


class LoCAAdapter(SparseSpectrum):
    """Holds the coefficients (n), the locations θ (2 x n; a buffer where they are fixed) and the steps done."""

    method = "loca"
    steps: Tensor

    def __init__(
        self,
        coefficients: Tensor,
        locations: Tensor,
        size: tuple[int, int],
        scale: float = 1.0,
        location_steps: int = 0,
        location_rate: float = 1.0,
    ) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(coefficients)
        self.locations: Tensor
        if location_steps:
            self.locations = nn.Parameter(locations)
        else:
            self.register_buffer("locations", locations)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.size, self.scale = size, scale
        self.location_steps, self.location_rate = location_steps, location_rate
        self._done = 0  # the value of `steps`, for which a forward pass need not ask the device
        self.phase: Phase = "coefficients"

    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        learned, (n_out, n_in) = self.phase == "locations", self.size
        y, x = self.locations if learned else self.locations.detach()
        y, x = _Rounded.run(y, n_out - 1), _Rounded.run(x, n_in - 1)
        rows, cols = y.long(), x.long()
        if not learned:
            return rows, cols, self.coefficients
        # Zeros, whose gradient at each place is that of half the difference between its neighbours.
        a = self.coefficients.detach()
        dy, dx = a * (y - y.detach()) / 2, a * (x - x.detach()) / 2
        down, up = (rows + 1).clamp(max=n_out - 1), (rows - 1).clamp(min=0)
        right, left = (cols + 1).clamp(max=n_in - 1), (cols - 1).clamp(min=0)
        return (
            torch.cat([rows, down, up, rows, rows]),
            torch.cat([cols, cols, cols, right, left]),
            torch.cat([a, dy, -dy, dx, -dx]),
        )

    def dense_change(self, shape: tuple[int, int]) -> Tensor:
        rows, cols, values = self.entries()
        return self.scale * idct(idct(scattered(values, rows, cols, shape)).mT).mT

    def change_of(self, x: Tensor, n_out: int) -> Tensor:
        rows, cols, values = self.entries()
        return idct(sparse_product(dct(x), self.scale * values, rows, cols, n_out))

    def parameter_groups(self) -> dict[str, Treatment]:
        return {"locations": Treatment(rate=self.location_rate)} if self.location_steps else {}

    def after_step(self, progress: float) -> None:
        """Count the step, choose what the next one trains, and keep θ within [0, 1]."""
        if self.location_steps:
            self._resume(self._done + 1)
            self.steps.fill_(self._done)
            self.locations.data.clamp_(0, 1)

    def _resume(self, done: int) -> None:
        self._done = done
        learned = done < self.location_steps and done % _CYCLE >= _COEFFICIENTS
        self.phase = "locations" if learned else "coefficients"

    def load_peft_state(self, tensors: dict[str, Tensor], site: Site) -> None:
        super().load_peft_state(tensors, site)
        self._resume(int(self.steps))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._resume(int(self.steps))


class _Rounded(Node):
    """`round(θ last)`, within 0 ... last; the gradient passes, clamped to [-1, 1] for each location."""

    @staticmethod
    def forward(locations: Tensor, last: int) -> Tensor:
        return (locations.clamp(0, 1) * last).round()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.last = inputs[1]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g.clamp(-1, 1) * ctx.last, None
