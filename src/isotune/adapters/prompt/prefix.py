"""Prefix tuning: keys and values of tokens that were never there, before those of the text, in every attention.

    attention(Q, [P_K; K], [P_V; V]),   P_K (p x k), P_V (p x v) of each layer

The queries, and so the lengths of all outputs, stay as they are. As in PEFT the prefix takes p positions of its own
before the text: in a model with rotary embeddings the keys of the prefix are turned back by p positions, for in this
library those of the text are not moved. The reparametrization by an MLP, which some use while training, is left out.

Papers: "Prefix-Tuning: Optimizing Continuous Prompts for Generation", ACL 2021, arXiv 2101.00190; "P-Tuning v2:
Prompt Tuning Can Be Comparable to Fine-tuning Universally Across Scales and Tasks", ACL 2022, arXiv 2110.07602.
Parameters: p (k + v). Cost for n queries: 2 n p (k + v) flops. It is no change of a weight, and a fresh one changes
the output.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from isotune.adapters.contract import Adapter
from isotune.adapters.prompt.attention import check_calls, inserted, through_sdpa, widths
from isotune.adapters.prompt.rotary import turned_back
from isotune.adapters.prompt.settings import PromptSettings
from isotune.sites import Site


class PrefixTuning(PromptSettings):
    """attention(Q, [P_K; K], [P_V; V]): learned keys and values in every layer."""

    name: ClassVar[str] = "prefix"
    formula: ClassVar[str] = "2 * tokens * n_in"
    usual_targets: ClassVar[str] = "attention"
    dialect: ClassVar[str] = "isotune.adapters.peft.prompts:PrefixDialect"

    spread: float = Field(0.02, gt=0, description="Standard deviation of what it starts from; 1 in PEFT.")

    def build(self, site: Site, generator: torch.Generator) -> PrefixAdapter:
        k, v = widths(site)
        K = self.spread * torch.randn(self.tokens, k, generator=generator)
        V = self.spread * torch.randn(self.tokens, v, generator=generator)
        return PrefixAdapter(K, V, turned_back(site.layer, self.tokens))

    def parameter_count(self, site: Site) -> int:
        return self.tokens * sum(widths(site))


class PrefixAdapter(Adapter):
    """Holds K (p x k) and V (p x v)."""

    method = "prefix"

    def __init__(self, K: Tensor, V: Tensor, turn: Tensor | None = None) -> None:
        super().__init__()
        self.K, self.V = nn.Parameter(K), nn.Parameter(V)
        self.register_buffer("turn", turn, persistent=False)
        self.turn: Tensor | None

    def keys(self) -> Tensor:
        """The keys (p, k) as the attention sees them."""
        if self.turn is None:
            return self.K
        d = self.turn.shape[0]
        return (self.K.view(len(self.K), -1, d) @ self.turn.to(self.K.dtype)).view_as(self.K)

    def forward(self, x: Tensor, site: Site, *args: Any, **kwargs: Any) -> Any:
        calls: list[Any] = []
        with through_sdpa(site.layer), inserted(self.keys(), self.V, calls):
            y = site(x, *args, **kwargs)
        check_calls(calls, site.layer)
        return y

    def reference(self, x: Tensor, site: Site, *args: Any, **kwargs: Any) -> Any:
        """As `forward`, (..., in) to (..., out): what it computes is written beside the tests."""
        return self.forward(x, site, *args, **kwargs)
