"""FourierFT: a weight change with n learned Fourier coefficients at random, fixed frequencies.

    W' = W + s Re(ifft2(S)),   S (out x in) zero but for n entries c, drawn once from `seed`

Layers of one shape have the same frequencies, those that PEFT draws from the same seed. The start is the identity,
c = 0; PEFT and the paper start from c ~ N(0, 1) (`start="random"`).

Paper: "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform", ICML 2024, arXiv 2405.03003.
Parameters: n. Cost for N rows: two FFTs and 4 n flops for each row, O(N (in log in + out log out + n)), or one 2-D
FFT of the weight, whichever is cheaper.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from isotune.adapters.settings import NotInPEFTError, Settings
from isotune.adapters.spectral.sparse_spectrum import MOST, SparseSpectrum, entry_count
from isotune.linalg.fourier import real_fourier, real_fourier_transpose
from isotune.linalg.sparse import scattered, sparse_product
from isotune.sites import CONVOLUTIONS, LINEAR, Site


class FourierFT(Settings):
    """W' = W + s Re(ifft2(S)): a change with few Fourier coefficients."""

    name: ClassVar[str] = "fourierft"
    kinds: ClassVar[frozenset[str]] = LINEAR | CONVOLUTIONS
    learning_rate: ClassVar[float] = 5e-2
    size_option: ClassVar[str | None] = "n_frequency"
    formula: ClassVar[str] = "1000"
    exempt: ClassVar[dict[str, str]] = {
        "seeds_decide_the_start": "it starts from zeros, at frequencies that its own option `seed` draws, as in PEFT"
    }
    peft_type: ClassVar[str | None] = "FOURIERFT"

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

    @classmethod
    def peft_config(cls, settings: dict[str, Settings]) -> dict[str, Any]:
        layers = {path: s for path, s in settings.items() if isinstance(s, FourierFT)}
        if len({(s.scale, s.seed) for s in layers.values()}) > 1:
            raise NotInPEFTError("PEFT's FourierFT has one scaling and one seed for all layers")
        counts = {path: s.n_frequency or MOST for path, s in layers.items()}
        common = Counter(counts.values()).most_common(1)[0][0]
        pattern = {path: n for path, n in counts.items() if n != common}
        if any(_matching(pattern, path, common) != n for path, n in counts.items()):
            raise NotInPEFTError("PEFT's n_frequency_pattern would give one layer the number of another's")
        first = next(iter(layers.values()))
        return {
            "n_frequency": common,
            "n_frequency_pattern": pattern,
            "scaling": first.scale,
            "random_loc_seed": first.seed,
            "init_weights": first.start == "zero",
            "bias": "none",
        }

    @classmethod
    def refused_by_peft(cls, site: Site) -> str | None:
        if site.kind in CONVOLUTIONS:
            return "is a convolution, which PEFT's FourierFT does not adapt"
        if site.in_features * site.out_features < MOST:
            return f"has fewer than {MOST} weights, where PEFT's FourierFT refuses its default number of frequencies"
        return None

    @classmethod
    def from_peft_config(cls, config: dict[str, Any], path: str) -> FourierFT:
        return cls(
            n_frequency=_matching(config.get("n_frequency_pattern") or {}, path, config["n_frequency"]),
            scale=config["scaling"],
            seed=config["random_loc_seed"],
            start="zero" if config.get("init_weights", False) else "random",
        )


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


@lru_cache(maxsize=64)
def drawn_cells(n: int, cells: int, seed: int) -> Tensor:
    """The first n of a random permutation of `cells` cells, as PEFT draws them."""
    return torch.randperm(cells, generator=torch.Generator().manual_seed(seed))[:n].clone()


def _matching(pattern: dict[str, int], path: str, default: int) -> int:
    """PEFT's rule: the first key that, as a regular expression, matches the path after a dot, or else the path."""
    key = next((key for key in pattern if re.match(rf".*\.{key}$", path)), path)
    return pattern.get(key, default)
