"""FourierFT: a weight change with n learned Fourier coefficients at random, fixed frequencies.

    W' = W + s Re(ifft2(S)),   S (out x in) zero but for n entries c, drawn once from `seed`

Layers of one shape have the same frequencies, those that PEFT draws from the same seed. The start is the identity,
c = 0; PEFT and the paper start from c ~ N(0, 1) (`start="random"`).

Paper: "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform", ICML 2024, arXiv 2405.03003.
Parameters: n. Cost for N rows: two FFTs and 4 n flops for each row, O(N (in log in + out log out + n)), or one 2-D
FFT of the weight, whichever is cheaper.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from isotune.adapters.settings import Settings
from isotune.adapters.spectral.sparse_spectrum import SparseSpectrum, entry_count
from isotune.linalg.fourier import real_fourier, real_fourier_transpose
from isotune.linalg.sparse import drawn_cells, scattered, sparse_product
from isotune.sites import CONVOLUTIONS, LINEAR, Site


class FourierFT(Settings):
    """W' = W + s Re(ifft2(S)): a change with few Fourier coefficients."""

    name: ClassVar[str] = "fourierft"
    kinds: ClassVar[frozenset[str]] = LINEAR | CONVOLUTIONS
    learning_rate: ClassVar[float] = 5e-2
    size_option: ClassVar[str | None] = "n_frequency"
    formula: ClassVar[str] = "1000"
    dialect: ClassVar[str] = "isotune.adapters.peft.fourierft:FourierFTDialect"
    exempt: ClassVar[dict[str, str]] = {
        "seeds_decide_the_start": "it starts from zeros, at frequencies that its own option `seed` draws, as in PEFT"
    }

    n_frequency: int | None = Field(
        None, gt=0, description="Number of coefficients; by default 1000, or all of a smaller weight's."
    )
    scale: float = Field(150.0, gt=0, description="The factor s on the change.")
    seed: int = Field(777, ge=0, le=2**63 - 1, description="Seed of the frequencies, for all layers.")
    start: Literal["zero", "random"] = Field(
        "zero", description="Coefficients at the start: zero, the identity; or N(0, 1), as in the paper."
    )

    @property
    def identity_at_start(self) -> bool:
        return self.start == "zero"

    def build(self, site: Site, generator: torch.Generator) -> FourierFTAdapter:
        n_in, n_out = site.in_features, site.out_features
        n = entry_count(self.n_frequency, n_in, n_out)
        spectrum = torch.zeros(n) if self.start == "zero" else torch.randn(n, generator=generator)
        return FourierFTAdapter(spectrum, drawn_cells(n, n_in * n_out, self.seed), n_in, self.scale)

    def parameter_count(self, site: Site) -> int:
        return entry_count(self.n_frequency, site.in_features, site.out_features)


class FourierFTAdapter(SparseSpectrum):
    """Holds the coefficients (n) and their cells, numbered row by row in the spectrum (out x in), not stored."""

    method = "fourierft"
    rows: Tensor
    cols: Tensor

    def __init__(self, spectrum: Tensor, cells: Tensor, n_in: int, scale: float = 1.0) -> None:
        super().__init__()
        self.spectrum = nn.Parameter(spectrum)
        self.register_buffer("rows", cells // n_in, persistent=False)
        self.register_buffer("cols", cells % n_in, persistent=False)
        self.scale = scale

    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.rows, self.cols, self.spectrum

    def dense_change(self, shape: tuple[int, int]) -> Tensor:
        rows, cols, values = self.entries()
        return self.scale * torch.fft.ifft2(scattered(values, rows, cols, shape)).real

    def change_of(self, x: Tensor, n_out: int) -> Tensor:
        # The change times x is s / (out in) Re Σ c exp(2πi (p i / out + q j / in)) x_j over entries c at (p, q).
        # Only half of the frequencies are kept, p and out - p being conjugate: real and imaginary parts (of opposite
        # sign where just one of p and q is in the other half) are entries of a real matrix.
        n_in = x.shape[-1]
        p, q, c = self.entries()
        conjugate = (p > n_out // 2) == (q > n_in // 2)
        p, q = torch.minimum(p, n_out - p), torch.minimum(q, n_in - q)
        c = c * (self.scale / (n_in * n_out))
        values = torch.cat([c, torch.where(conjugate, -c, c)])
        rows, cols = torch.cat([2 * p, 2 * p + 1]), torch.cat([2 * q, 2 * q + 1])
        z = sparse_product(real_fourier(x), values, rows, cols, 2 * (n_out // 2 + 1))
        return real_fourier_transpose(z, n_out)
