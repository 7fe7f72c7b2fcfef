"""MoA, a mixture of adapters: several narrow networks beside a block, or behind it, of which each token gets a share.

    dense    y_n = f(x)_n + Σ_e p_ne E_e(v_n),   p_n = softmax(G v_n + g)
    soft     y_n = f(x)_n + Σ_es c_nes E_e(Σ_m a_mes v_m),   L = V Gᵀ,   a = softmax of L over m,   c over e and s

with E_e(v) = U_e act(D_e v + d_e) + u_e, and v what the block reads (parallel) or what it gives (sequential). The
soft form has S slots for each expert: a slot is a mean of all tokens of a sequence, and each token gets a mean of
what becomes of all slots, so that the experts run on E S rows a sequence, however long that is. Of rows without a
dimension for time each is a sequence of its own. U starts at zero; the authors' D and U both do, and no gradient
reaches either.

Padding takes no part in a slot where it is known: `isotune train` says which tokens are real, elsewhere
`isotune.tokens(model, attention_mask)` does before each batch. The soft form lets a token see later ones: it is for
encoders, and a causal model would train on what it does not have when it generates. Dense is therefore the default.

Papers: "Parameter-Efficient Transfer Learning of Audio Spectrogram Transformers", 2023, arXiv 2312.03694; "Efficient
Fine-tuning of Audio Spectrogram Transformers via Soft Mixture of Adapters", 2024, arXiv 2402.00828. Parameters: E (r
(in + out + 1) + out), and E (in + 1) for the gate or E S in for the slots. Cost: for n rows 2 n E (r (in + out) +
in) flops dense, for a sequence of n tokens 2 E S (n (2 in + out) + r (in + out)) soft. It is no change of a weight.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from isotune.adapters.bottleneck.bottleneck import ACTIVATIONS, Activation, PlacedSettings
from isotune.adapters.contract import Branch, Parts
from isotune.adapters.sequences import as_sequences, real_tokens
from isotune.linalg.random_bases import uniform
from isotune.sites import Site


class MoA(PlacedSettings):
    """y = f(x) + Σ_e p_e (U_e act(D_e v + d_e) + u_e): a mixture of bottlenecks at a block."""

    name: ClassVar[str] = "moa"
    learning_rate: ClassVar[float] = 5e-3
    formula: ClassVar[str] = "7 * (rank * (n_in + n_out + 1) + n_out + n_in + 1)"

    rank: int = Field(8, gt=0, description="Width of each expert.")
    experts: int = Field(7, gt=0, description="How many experts there are.")
    routing: Literal["dense", "soft"] = Field(
        "dense", description="A share of all experts for each token, or slots that mix the tokens of a sequence."
    )
    slots: int = Field(1, gt=0, description="Slots of each expert, in the soft form.")
    activation: Activation = Field("gelu", description="Between D and U.")

    def build(self, site: Site, generator: torch.Generator) -> MoAAdapter:
        n_in, n_out = self.sides(site)
        D = uniform((self.experts, self.rank, n_in), n_in**-0.5, generator)
        choices = self.experts * (self.slots if self.routing == "soft" else 1)
        return MoAAdapter(D, uniform((choices, n_in), n_in**-0.5, generator), n_out, self)

    def parameter_count(self, site: Site) -> int:
        n_in, n_out = self.sides(site)
        gate = n_in + 1 if self.routing == "dense" else self.slots * n_in
        return self.experts * (self.rank * (n_in + n_out + 1) + n_out + gate)


class MoAAdapter(Branch):
    """Holds D (E x r x in), d (E x r), U (E x out x r), u (E x out), and G (E x in), g (E) or G (E S x in)."""

    method = "moa"
    parts: Parts = MappingProxyType({"D": "matrices", "U": "matrices"})

    def __init__(self, D: Tensor, G: Tensor, n_out: int, settings: MoA) -> None:
        super().__init__()
        E, r, _ = D.shape
        self.D, self.d = nn.Parameter(D), nn.Parameter(torch.zeros(E, r))
        self.U, self.u = nn.Parameter(torch.zeros(E, n_out, r)), nn.Parameter(torch.zeros(E, n_out))
        self.G = nn.Parameter(G)
        self.g = nn.Parameter(torch.zeros(E)) if settings.routing == "dense" else None
        self.settings, self.dropout = settings, nn.Dropout(settings.dropout)
        self.tokens: Tensor | None = None
        self.reads = settings.reads  # type: ignore[misc]

    def change(self, v: Tensor) -> Tensor:
        v = v.to(self.D.dtype)
        if self.settings.routing == "dense":
            return self._dense(v)
        return self._soft(as_sequences(v)).view(*v.shape[:-1], -1)

    def _act(self, z: Tensor) -> Tensor:
        return self.dropout(ACTIVATIONS[self.settings.activation](z))

    def _dense(self, v: Tensor) -> Tensor:
        p = nn.functional.linear(v, self.G, self.g).softmax(-1)
        z = self._act(nn.functional.linear(v, self.D.flatten(0, 1), self.d.flatten()))
        weighed = (z.unflatten(-1, self.d.shape) * p.unsqueeze(-1)).flatten(-2)
        return nn.functional.linear(weighed, self.U.movedim(0, 1).flatten(1)) + p @ self.u

    def _soft(self, v: Tensor) -> Tensor:
        logits = nn.functional.linear(v, self.G)
        real = real_tokens(self.tokens, v)
        kept = logits if real is None else logits.masked_fill(~real.unsqueeze(-1), torch.finfo(logits.dtype).min)
        slots = (kept.softmax(1).mT @ v).unflatten(1, (len(self.D), -1))
        z = self._act(torch.einsum("besi,eri->besr", slots, self.D) + self.d.unsqueeze(1))
        y = torch.einsum("besr,eor->beso", z, self.U) + self.u.unsqueeze(1)
        return logits.softmax(-1) @ y.flatten(1, 2)
