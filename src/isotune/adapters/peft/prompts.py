"""Prefix and prompt tuning in PEFT, which keeps one tensor for the whole model, and moves the text by p positions.

prompt_embeddings (p x L 2 k):  K of layer 1, V of layer 1, K of layer 2, ...     prefix tuning
prompt_embeddings (p x d):      P                                                 prompt tuning
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from isotune.adapters.peft.dialect import Dialect
from isotune.adapters.prompt.rotary import turned_back
from isotune.adapters.settings import Settings
from isotune.sites import Site

_NAME = "prompt_embeddings"


class PromptDialect(Dialect):
    """Prompts before the embeddings of the text."""

    peft_type = "PROMPT_TUNING"
    whole = frozenset({_NAME})

    def config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {"num_virtual_tokens": self.same(settings).tokens}

    def read(self, config: dict[str, Any], path: str) -> Settings:
        return self.settings(tokens=config["num_virtual_tokens"])

    def joined(self, states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {_NAME: torch.cat([state["prompt_P"] for state in states], dim=1)}

    def parted(self, tensors: Mapping[str, Tensor], layers: int) -> list[dict[str, Tensor]]:
        return [{"prompt_P": P.contiguous()} for P in tensors[_NAME].chunk(layers, dim=1)]


class PrefixDialect(PromptDialect):
    """Keys and values before those of the text."""

    peft_type = "PREFIX_TUNING"

    def config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {**super().config(settings), "prefix_projection": False}

    def refused(self, site: Site) -> str | None:
        if turned_back(site.layer, 1) is not None:
            return None
        return "has no rotary embeddings: PEFT moves the text by the length of the prefix, which its model would see"

    def joined(self, states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {_NAME: torch.cat([state[f"prefix_{side}"] for state in states for side in "KV"], dim=1)}

    def parted(self, tensors: Mapping[str, Tensor], layers: int) -> list[dict[str, Tensor]]:
        parts = [part.contiguous() for part in tensors[_NAME].chunk(2 * layers, dim=1)]
        return [{"prefix_K": K, "prefix_V": V} for K, V in zip(parts[::2], parts[1::2], strict=True)]
