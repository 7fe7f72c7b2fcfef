"""Deep prompts: tokens that were never there enter every layer, and are dropped behind it (VPT-deep).

    y = f([P; x])[p:],   P (p x d) of each layer

What a dropped token does to the others it does through its key and its value alone: so P goes through the layer by
itself, once for the whole batch, and its key and value are put before those of x. In models with rotary embeddings
prompts have no position. Targets are layers, `targets="blocks"`; the authors' code for spectrograms loses the second
class token of AST to the first prompt, here every token stays.

Papers: "Visual Prompt Tuning", ECCV 2022, arXiv 2203.12119; "Parameter-Efficient Transfer Learning of Audio
Spectrogram Transformers", 2023, arXiv 2312.03694. Parameters: p d. Cost: f on p rows, and 4 n p d flops for n
queries. It is no change of a weight, and a fresh one changes the output.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from isotune.adapters.contract import Adapter
from isotune.adapters.prompt.attention import check_calls, inserted, recorded, through_sdpa, widths
from isotune.adapters.prompt.settings import PromptSettings
from isotune.bare import bare_class
from isotune.linalg.random_bases import uniform
from isotune.sites import Site


class DeepPrompts(PromptSettings):
    """y = f([P; x])[p:]: learned tokens in every layer."""

    name: ClassVar[str] = "deep_prompt"
    usual_targets: ClassVar[str] = "blocks"

    tokens: int = Field(25, gt=0, description="Prompts p for each layer.")

    def build(self, site: Site, generator: torch.Generator) -> DeepPromptAdapter:
        widths(site)  # an attention is in it
        d = site.in_features
        return DeepPromptAdapter(uniform((self.tokens, d), (3 / d) ** 0.5, generator))

    def parameter_count(self, site: Site) -> int:
        return self.tokens * site.in_features


class DeepPromptAdapter(Adapter):
    """Holds P (p x d)."""

    method = "deep_prompt"

    def __init__(self, P: Tensor) -> None:
        super().__init__()
        self.P = nn.Parameter(P)

    def forward(self, x: Tensor, site: Site, *args: Any, **kwargs: Any) -> Any:
        with through_sdpa(site.layer):
            found: list[Any] = []
            with recorded(found):
                site(self.P[None].to(x.dtype), **_asked_of(site.layer, self.P, kwargs))
            check_calls(found, site.layer)
            K, V = (t[0].transpose(0, 1).flatten(1) for t in found[0])
            with inserted(K, V, []):
                return site(x, *args, **kwargs)

    def reference(self, x: Tensor, site: Site, *args: Any, **kwargs: Any) -> Any:
        """Of x (b, n, in) the y (b, n, out) of a layer that asks for nothing else: both together go through it."""
        y = site(torch.cat([self.P.expand(len(x), -1, -1).to(x.dtype), x], dim=1))
        return (y if isinstance(y, Tensor) else y[0])[:, len(self.P) :]


def _asked_of(layer: nn.Module, P: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What the layer has to be given beside P (p, d): nothing, but rotary embeddings that turn nothing."""
    parameters = list(inspect.signature(bare_class(layer).forward).parameters.values())[2:]
    asked = {
        one.name: None for one in parameters if one.kind == one.POSITIONAL_OR_KEYWORD and one.default is one.empty
    }
    if (rotary := kwargs.get("position_embeddings")) is None:
        return asked
    cos, sin = (t[:1, :1].expand(1, len(P), -1) for t in rotary)
    return {**asked, "position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}
