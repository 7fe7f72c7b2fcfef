"""Lily, low-rank interconnected adaptation across layers: few A for neighbouring layers, the same experts B for all.

    y = W x + b + s Σ_e p_e (A x)ᵀ B_e,   p = softmax(R A x),   A (r x in), B_e (r x out), R (E x r)

Layers of one name, such as all `q_proj`, and of one size have the experts B in common, and every `stride` of them
that follow each other an A; R is each layer's own. `groups` names other endings of paths by which layers belong
together. B starts at zero.

The authors' code and PEFT average p over all tokens of the batch, so that what is computed for one text depends on
its neighbours, on padding, and on how many texts run at once. Here each token has its own p (`routing="token"`) or,
with `routing="sequence"`, the mean over the tokens of its own text that are no padding: `isotune train` says which
are, in a loop of one's own `isotune.tokens(model, attention_mask)` before each batch does. A batch of one text is
then what it is in PEFT, whose adapters load as such. In a causal model that mean lets a token see later ones: what
is generated with a cache is not what a pass over the whole text gives.

Paper: "Low-Rank Interconnected Adaptation across Layers", 2024, arXiv 2407.09946. Parameters: E r for each layer, r
in for every `stride` layers of a name, E r out for all of them. Cost for n rows: 2 n r (in + E out) flops. What it
adds depends on the row, so that it folds into no weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from isotune.adapters.contract import Adapter, check_tensors
from isotune.adapters.mixed import NO_WEIGHT
from isotune.adapters.sequences import real_tokens
from isotune.adapters.settings import Settings
from isotune.adapters.shared import Shared
from isotune.errors import OptionError
from isotune.linalg.random_bases import uniform
from isotune.sites import LINEAR, Site


class Lily(Settings):
    """y = W x + b + s Σ_e p_e (A x)ᵀ B_e: neighbouring layers share A, all layers of a name the experts B_e."""

    name: ClassVar[str] = "lily"
    kinds: ClassVar[frozenset[str]] = LINEAR
    learning_rate: ClassVar[float] = 1e-2
    formula: ClassVar[str] = "2 * rank"
    dialect: ClassVar[str] = "isotune.adapters.peft.lily:LilyDialect"
    trains_shared: ClassVar[bool] = True
    exempt: ClassVar[dict[str, str]] = {**NO_WEIGHT}

    rank: int = Field(32, gt=0, description="Rows of A; fewer matrices leave room for more than a LoRA has.")
    stride: int = Field(1, gt=0, description="How many layers that follow each other have an A in common.")
    experts: int = Field(2, gt=1, description="Experts B that all layers of a group have in common.")
    scale: float = Field(1.0, gt=0, description="Factor on the change; the paper's s.")
    routing: Literal["token", "sequence"] = Field(
        "token", description="Weigh experts for each token, or by the mean over the tokens of each text (as in PEFT)."
    )
    groups: tuple[str, ...] = Field(
        (),
        description="Endings of paths, each of a group of layers that share; by default the last part of the name.",
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of the A, which layers share.")

    def build(self, site: Site, generator: torch.Generator) -> LilyAdapter:
        R = uniform((self.experts, self.rank), self.rank**-0.5, generator)
        return LilyAdapter(R, site.in_features, site.out_features, self)

    def shared_at(self, sites: Mapping[str, Site]) -> dict[str, dict[str, Tensor]]:
        draw = torch.Generator().manual_seed(self.seed)
        found: dict[str, dict[str, Tensor]] = {}
        for paths in self._together(sites):
            n_in, n_out = sites[paths[0]].in_features, sites[paths[0]].out_features
            B = torch.zeros(self.experts, self.rank, n_out)
            for start in range(0, len(paths), self.stride):
                A = uniform((self.rank, n_in), n_in**-0.5, draw)
                own = {"lily_A": A, "lily_B": B}
                found |= dict.fromkeys(paths[start : start + self.stride], own)
        return found

    def shared_count(self, sites: Mapping[str, Site]) -> int:
        total = 0
        for paths in self._together(sites):
            site = sites[paths[0]]
            total += self.rank * (-(-len(paths) // self.stride) * site.in_features + self.experts * site.out_features)
        return total

    @property
    def stores_shared(self) -> bool:
        return False  # PEFT's files hold A and B with each layer

    def _together(self, sites: Mapping[str, Site]) -> list[list[str]]:
        """The paths that have their B in common, in the model's order."""
        groups: dict[tuple[str, int, int], list[str]] = {}
        for path, site in sites.items():
            groups.setdefault((self.ending(path), site.in_features, site.out_features), []).append(path)
        return list(groups.values())

    def ending(self, path: str) -> str:
        """That by which a layer's path belongs to a group. Raises OptionError where it belongs to none."""
        if not self.groups:
            return path.rpartition(".")[2]
        fitting = [ending for ending in self.groups if path.endswith(ending)]
        if not fitting:
            raise OptionError(f"lily: {path!r} ends in none of groups={self.groups}; name an ending for it, or none")
        return max(fitting, key=len)

    def parameter_count(self, site: Site) -> int:
        return self.experts * self.rank


class LilyAdapter(Adapter):
    """Holds R (E x r); A (r x in) and B (E x r x out) are shared."""

    method = "lily"

    def __init__(self, R: Tensor, n_in: int, n_out: int, settings: Lily) -> None:
        super().__init__()
        self.R = nn.Parameter(R)
        self.n_in, self.n_out, self.settings = n_in, n_out, settings
        self.tokens: Tensor | None = None

    def share(self, shared: Shared) -> None:
        self.shared = shared
        E, r = self.R.shape
        check_tensors(shared.tensors(), {"lily_A": (r, self.n_in), "lily_B": (E, r, self.n_out)})

    def weights(self, z: Tensor) -> Tensor:
        """p (..., E) for z = A x (..., r), or (b, 1, ..., E) where it is the mean of a text; in fp32 or better."""
        p = (z.to(self.R.dtype) @ self.R.mT).softmax(-1)
        if self.settings.routing == "token" or p.dim() < 3:
            return p
        real = real_tokens(self.tokens, z)
        if real is None:
            return p.mean(tuple(range(1, p.dim() - 1)), keepdim=True)
        share = real / real.sum(-1, keepdim=True).clamp_min(1)
        return share.to(p.dtype).unsqueeze(1) @ p

    def forward(self, x: Tensor, site: Site) -> Tensor:
        y = site(x)
        with torch.autocast(device_type=x.device.type, enabled=False):
            z = x.to(y.dtype) @ self.shared["lily_A"].mT.to(y.dtype)
            weighed = self.weights(z).to(z.dtype).unsqueeze(-1) * z.unsqueeze(-2)
            change = weighed.flatten(-2) @ self.shared["lily_B"].flatten(0, 1).to(z.dtype)
        return y + self.settings.scale * change

    def reference(self, x: Tensor, site: Site) -> Tensor:
        y = site(x)
        z = x.to(y.dtype) @ self.shared["lily_A"].mT.to(y.dtype)
        p = self.weights(z).to(z.dtype)
        return y + self.settings.scale * sum(
            p[..., e, None] * (z @ B.to(z.dtype)) for e, B in enumerate(self.shared["lily_B"])
        )

    def peft_state(self, site: Site) -> dict[str, Tensor]:
        A, B = self.shared["lily_A"].detach(), self.shared["lily_B"].detach()
        return {"lily_A.weight": A, "lily_B.weight": B.flatten(0, 1), "lily_router.weight": self.R.detach()}
