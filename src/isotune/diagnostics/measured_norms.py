"""How large the numbers that enter attention are on a batch: the measured side of `norm_bound`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from isotune.diagnostics.norm_bound import role_of
from isotune.errors import TargetError
from isotune.model.names import base_modules
from isotune.model.switch import disabled


@dataclass(frozen=True)
class AttentionNorm:
    """What one projection of an attention layer gives."""

    largest: float
    """The largest entry, by size."""
    kurtosis: float
    """Of the entries: 3 for a normal distribution, more where few are much larger than the others."""


@torch.no_grad()
def attention_norms(
    model: nn.Module, inputs: Mapping[str, Any], adapted: bool = True
) -> dict[str, dict[str, AttentionNorm]]:
    """The entries of queries, keys and values on one batch, by layer and by role.

    Args:
        model: A model, with adapters or without; it is run in the mode that it is in.
        inputs: What the model is called with.
        adapted: With its adapters, or as the bare base.

    Raises:
        TargetError: No layer is called as projections of attention are, such as q_proj, query or c_attn.
    """
    found: dict[str, dict[str, AttentionNorm]] = defaultdict(dict)

    def watch(layer: str, role: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_module: nn.Module, _inputs: Any, y: Tensor) -> None:
            y = y.double()
            centred = y - y.mean()
            spread = centred.square().mean().clamp_min(1e-300)
            found[layer][role] = AttentionNorm(float(y.abs().max()), float(centred.pow(4).mean() / spread.square()))

        return hook

    hooks = [
        module.register_forward_hook(watch(path.rpartition(".")[0], role))
        for path, module in base_modules(model)
        if (role := role_of(path))
    ]
    if not hooks:
        raise TargetError(
            "no layer of this model is called as attention's projections are: q_proj, query, c_attn, ..."
        )
    try:
        with nullcontext() if adapted else disabled(model):
            model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return dict(found)
