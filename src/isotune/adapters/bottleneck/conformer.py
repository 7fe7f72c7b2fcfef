"""The conformer adapter: a narrow convolution over time beside a block, or behind it.

    y = f(x) + U silu(norm(K * z)) + u,   z = a σ(c),   [a, c] = V layernorm(v) + w

V (2m x in), K a depthwise convolution of k steps over the n of (b, n, d), U (out x m), and v what the block reads
(parallel) or what it gives (sequential). U starts at zero. The authors' code computes the LayerNorm and then goes on
with v as it was; here it counts. K has no bias: the norm behind it would take it away.

`norm="batch"`, the paper's, has statistics of the batch while it trains, so that a row then depends on the others;
afterwards it has those that it gathered, which are saved with the adapter. `norm="layer"` is for batches too small
for that. The convolution is symmetric, so that a token sees later ones. With `causal` it sees earlier ones alone, of
which a step of generating with a cache has none: call `generate(use_cache=False)`. Padding counts as zero and has no
part in the statistics where it is known: `isotune train` says which tokens are real, elsewhere
`isotune.tokens(model, attention_mask)` does before each batch. Of rows without a dimension for time each is a
sequence of its own.

Paper: "Parameter-Efficient Transfer Learning of Audio Spectrogram Transformers", 2023, arXiv 2312.03694. Parameters:
2 in + 2 m (in + 1) + m (k + 2) + out (m + 1). Cost for n rows: 2 n m (2 in + k + out) flops. It is no change of a
weight.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from isotune.adapters.bottleneck.bottleneck import PlacedSettings
from isotune.adapters.contract import Branch, Parts
from isotune.adapters.sequences import as_sequences, real_tokens
from isotune.linalg.random_bases import uniform
from isotune.sites import Site


class Conformer(PlacedSettings):
    """y = f(x) + U silu(norm(K * glu(V layernorm(v) + w))) + u: a narrow convolution over time at a block."""

    name: ClassVar[str] = "conformer"
    learning_rate: ClassVar[float] = 1e-3
    formula: ClassVar[str] = "2 * n_in + 2 * rank * (n_in + 1) + 33 * rank + n_out * (rank + 1)"

    rank: int = Field(8, gt=0, description="Channels of the convolution; the paper's bottleneck.")
    kernel: int = Field(31, gt=0, description="Steps in time that the convolution spans.")
    norm: Literal["batch", "layer"] = Field("batch", description="Behind the convolution; the paper's: batch.")
    causal: bool = Field(False, description="Convolve with earlier steps alone.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the change while training.")

    def build(self, site: Site, generator: torch.Generator) -> ConformerAdapter:
        n_in, n_out = self.sides(site)
        V = uniform((2 * self.rank, n_in), n_in**-0.5, generator)
        K = uniform((self.rank, 1, self.kernel), self.kernel**-0.5, generator)
        return ConformerAdapter(V, K, n_out, self)

    def parameter_count(self, site: Site) -> int:
        n_in, n_out = self.sides(site)
        inner = 2 * self.rank * (n_in + 1) + self.rank * (self.kernel + 2)
        return 2 * n_in + inner + n_out * (self.rank + 1)


class ConformerAdapter(Branch):
    """Holds V (2m x in), w (2m), K (m x 1 x k), U (out x m), u (out) and norms, `before` (in) and `behind` (m)."""

    method = "conformer"
    parts: Parts = MappingProxyType({"V": "A", "U": "B"})

    def __init__(self, V: Tensor, K: Tensor, n_out: int, settings: Conformer) -> None:
        super().__init__()
        m = len(K)
        self.before = nn.LayerNorm(V.shape[1])
        self.V, self.w, self.K = nn.Parameter(V), nn.Parameter(torch.zeros(2 * m)), nn.Parameter(K)
        self.behind = nn.BatchNorm1d(m) if settings.norm == "batch" else nn.LayerNorm(m)
        self.U, self.u = nn.Parameter(torch.zeros(n_out, m)), nn.Parameter(torch.zeros(n_out))
        self.settings, self.dropout = settings, nn.Dropout(settings.dropout)
        self.tokens: Tensor | None = None
        self.reads = settings.reads  # type: ignore[misc]

    def change(self, v: Tensor) -> Tensor:
        x = as_sequences(v.to(self.V.dtype))
        real = real_tokens(self.tokens, x)
        z = F.glu(F.linear(self.before(x), self.V, self.w))
        if real is not None:
            z = z * real.unsqueeze(-1)
        k = self.settings.kernel
        sides = (k - 1, 0) if self.settings.causal else ((k - 1) // 2, k // 2)
        z = F.conv1d(F.pad(z.mT, sides), self.K, groups=len(self.K)).mT
        y = F.linear(F.silu(self._normed(z, real)), self.U, self.u)
        return self.dropout(y).view(*v.shape[:-1], -1)

    def _normed(self, z: Tensor, real: Tensor | None) -> Tensor:
        """The norm of z (b, n, m), its statistics over real tokens alone."""
        if self.settings.norm == "layer":
            return self.behind(z)
        if real is None or not self.training:
            return self.behind(z.flatten(0, 1)).view(z.shape)
        return torch.zeros_like(z).masked_scatter(real.unsqueeze(-1), self.behind(z[real]))
