"""AdaptFormer: a bottleneck beside the MLP of each layer, scaled and added to what the MLP gives.

    y = f(x) + a (U relu(D v + d) + u),   a = 0.1

In the paper's figure v is the MLP's own input, which a norm has scaled: so it is with `targets=["mlp"]`, or whatever
the model calls them, for v = x. In the authors' code, and they say that it is right, v is the residual stream h
before that norm:

    h = x + attention(norm(x)),   y = h + MLP(norm'(h)) + a (U relu(D h + d) + u)

That is an adapter on the whole layer, `targets="blocks"`, which is told the name of the norm: `before=
"post_attention_layernorm"` in a Llama, `"layernorm_after"` in a ViT. What enters the norm is seen by a hook while the
layer runs. U starts at zero, so that the model is unchanged at first.

Paper: "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition", NeurIPS 2022, arXiv 2205.13535.
Parameters: 2 d r + r + d. Cost for n rows: 4 n d r flops. It is no change of a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from isotune.adapters.bottleneck.bottleneck import Bottleneck, BottleneckSettings
from isotune.adapters.settings import Settings
from isotune.bare import bare_class
from isotune.errors import IsotuneError, OptionError
from isotune.sites import Site
from isotune.sites.block import replaced_first


class AdaptFormer(BottleneckSettings):
    """y = f(x) + a (U relu(D v + d) + u): a bottleneck beside a block."""

    name: ClassVar[str] = "adaptformer"
    learning_rate: ClassVar[float] = 2e-3

    scale: float = Field(0.1, gt=0, description="Factor on the change; the paper's s.")
    dropout: float = Field(0.1, ge=0, lt=1, description="Dropout between the activation and U while training.")
    before: str | None = Field(None, description="A norm in the block, by name: D reads what enters that norm.")

    def allot(self, sites: Mapping[str, Site]) -> dict[str, Settings]:
        if self.before is not None:
            for site in sites.values():
                _norm(site.layer, self.before)
        return super().allot(sites)

    def build(self, site: Site, generator: torch.Generator) -> Bottleneck:
        if self.before is not None and self.place == "sequential":
            raise OptionError(f"before={self.before!r} says what D reads, and so does place='sequential': drop one")
        return AdaptFormerAdapter(*self.start(site, generator), self)


class AdaptFormerAdapter(Bottleneck):
    """A bottleneck that may read what enters a norm inside its block."""

    settings: AdaptFormer

    def forward(self, x: Tensor, site: Site, *args: Any, **kwargs: Any) -> Any:
        if self.settings.before is None:
            return super().forward(x, site, *args, **kwargs)
        seen: list[Tensor] = []
        handle = _norm(site.layer, self.settings.before).register_forward_pre_hook(
            lambda _, given, named: seen.append(next(iter((*given, *named.values())))), with_kwargs=True
        )
        try:
            y = site(x, *args, **kwargs)
        finally:
            handle.remove()
        if len(seen) != 1:
            raise IsotuneError(
                f"before={self.settings.before!r}: a {bare_class(site.layer).__name__} called this norm {len(seen)} "
                "times, where it has to once; name another"
            )
        return replaced_first(y, lambda first: first + self.change(seen[0]).to(first))


def _norm(layer: nn.Module, name: str) -> nn.Module:
    """The module of that name in a layer. Raises OptionError where there is none."""
    try:
        return layer.get_submodule(name)
    except AttributeError:
        inside = {own: bare_class(module).__name__ for own, module in layer.named_modules() if own}
        norms = [own for own, kind in inside.items() if "norm" in kind.lower()]
        raise OptionError(
            f"before={name!r} is no module in a {bare_class(layer).__name__}, whose norms are: "
            f"{', '.join(norms) or 'none'}; it names one in a whole layer, such as targets='blocks' finds"
        ) from None
