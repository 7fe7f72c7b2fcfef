"""Prompt tuning: embeddings of tokens that are in no vocabulary, before those of the text.

    f([P; E(ids)])[p:],   P (p x d)

The target is the module that turns token ids into hidden states, `targets="stack"`. What it gives keeps the length of
the text, so that heads, losses and labels need not know of the prompt; what it gives for a pooled first token is that
of the text's first token, where PEFT pools the first prompt. While text is generated the prompt is in the cache.

Paper: "The Power of Scale for Parameter-Efficient Prompt Tuning", EMNLP 2021, arXiv 2104.08691. Parameters: p d.
Cost: that of p tokens more. It is no change of a weight, and a fresh one changes the output.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from isotune.adapters.contract import Adapter
from isotune.adapters.prompt.settings import PromptSettings
from isotune.bare import bare_class
from isotune.errors import IsotuneError, OptionError
from isotune.sites import Site
from isotune.sites.block import replaced_first


class PromptTuning(PromptSettings):
    """f([P; E(ids)])[p:]: learned embeddings before those of the text."""

    name: ClassVar[str] = "prompt"
    usual_targets: ClassVar[str] = "stack"
    dialect: ClassVar[str] = "isotune.adapters.peft.prompts:PromptDialect"

    start: Literal["vocabulary", "random"] = Field(
        "vocabulary", description="Whether it starts as embeddings of tokens drawn at random, or as random numbers."
    )

    def build(self, site: Site, generator: torch.Generator) -> PromptAdapter:
        table = _table(site.layer)
        if self.start == "random":
            return PromptAdapter(torch.randn(self.tokens, table.shape[1], generator=generator))
        rows = torch.randint(len(table), (self.tokens,), generator=generator)
        return PromptAdapter(table[rows.to(table.device)].float().cpu())

    def shell(self, site: Site) -> PromptAdapter:
        return PromptAdapter(torch.zeros(self.tokens, _table(site.layer).shape[1]))

    def parameter_count(self, site: Site) -> int:
        return self.tokens * site.in_features


class PromptAdapter(Adapter):
    """Holds P (p x d)."""

    method = "prompt"

    def __init__(self, P: Tensor) -> None:
        super().__init__()
        self.P = nn.Parameter(P)

    def forward(self, x: Any, site: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.update(zip(_names(site.layer)[1:], args, strict=False))
        cache = kwargs.get("past_key_values")
        begun = cache is not None and cache.get_seq_length() > 0
        kwargs = self._lengthened(kwargs, begun)
        if begun:
            return site(x, **kwargs)
        text = kwargs.pop("inputs_embeds", None)
        if text is None:
            text = x if x.is_floating_point() else site.layer.get_input_embeddings()(x)
        prompt = self.P.to(text).expand(len(text), -1, -1)
        y = site(None, inputs_embeds=torch.cat([prompt, text], dim=1), **kwargs)
        return _shortened(y, len(self.P), site.layer)

    def reference(self, x: Tensor, site: Site, *args: Any, **kwargs: Any) -> Any:
        """As `forward`, (..., in) to (..., out): what it computes is written beside the tests."""
        return self.forward(x, site, *args, **kwargs)

    def _lengthened(self, kwargs: dict[str, Any], begun: bool) -> dict[str, Any]:
        """What is said of the tokens of the text, said of the prompt as well."""
        p, changed = len(self.P), dict(kwargs)
        mask = kwargs.get("attention_mask")
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.dim() != 2:
                raise IsotuneError(
                    "prompt takes an attention mask of shape (batch, tokens), not one made ready before"
                )
            changed["attention_mask"] = torch.cat([mask.new_ones(len(mask), p), mask], dim=1)
        for name in ("position_ids", "cache_position"):
            if (places := kwargs.get(name)) is not None:
                first = torch.arange(0 if begun else p, device=places.device).expand(*places.shape[:-1], -1)
                changed[name] = torch.cat([first.to(places), places + p], dim=-1)
        if not begun and (types := kwargs.get("token_type_ids")) is not None:
            changed["token_type_ids"] = torch.cat([types.new_zeros(len(types), p), types], dim=1)
        return changed


def _table(layer: nn.Module) -> Tensor:
    """The embeddings (tokens, d) of the vocabulary. Raises OptionError for a module that reads no tokens."""
    get: Any = getattr(layer, "get_input_embeddings", None)
    table = get() if callable(get) and "inputs_embeds" in _names(layer) else None
    if not isinstance(table, nn.Embedding):
        raise OptionError(
            f"a {bare_class(layer).__name__} does not turn token ids, or inputs_embeds, into hidden states; name the "
            "module that does, such as targets=['model'], or take deep_prompt"
        )
    return table.weight.detach()


def _names(layer: nn.Module) -> list[str]:
    return list(inspect.signature(bare_class(layer).forward).parameters)[1:]


def _shortened(y: Any, p: int, layer: nn.Module) -> Any:
    """What the stack gave for p prompts and the text, for the text alone."""
    y = replaced_first(y, lambda hidden: hidden[:, p:])
    if not isinstance(y, Mapping):
        return y
    changed = {**y}
    if y.get("hidden_states") is not None:
        changed["hidden_states"] = tuple(hidden[:, p:] for hidden in y["hidden_states"])
    if y.get("pooler_output") is not None:
        changed["pooler_output"] = layer.pooler(next(iter(y.values())))  # type: ignore[operator]
    return type(y)(**changed)
