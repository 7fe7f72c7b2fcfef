"""LoRAs on single experts, from before transformers made the experts of a layer one parameter."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from isotune.adapters.low_rank.lora import LoRA
from isotune.bare import bare_class
from isotune.checkpoint.as_loaded import AsLoaded, laid_out_as
from isotune.checkpoint.stored import StoredAdapter
from isotune.model.names import unwrapped

A, B = "lora_A.weight", "lora_B.weight"


def on_joined_experts(stored: StoredAdapter, model: nn.Module, known: Collection[str]) -> StoredAdapter:
    """The adapter with those of its paths that are not `known` as transformers has them in this model.

    Where a matrix is made of several that were one below the other, such as gate and up, their LoRAs become one:
    the A's below each other, B block-diagonal, of the sum of the ranks. What has no place stays as it is.
    """
    old = {p: s for p, s in stored.settings.items() if p not in known and type(s) is LoRA}
    if not old or stored.header is not None:
        return stored
    own: Any = unwrapped(model)
    loaded = AsLoaded(laid_out_as(bare_class(own), getattr(own, "config", None)), [f"{p}.weight" for p in old])
    parts: dict[str, dict[int, str]] = defaultdict(dict)  # by the path of the matrix, which is at which place in it
    blocks: dict[str, int] = {}
    for name, (first, converter) in loaded.made_by.items():
        kinds = [type(operation).__name__ for operation in converter.operations]
        if kinds not in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]):
            continue
        for key, pattern in loaded.sources[first]:
            number = re.search(re.escape(pattern).replace(r"\*", r"(\d+)"), key)
            if number is not None:
                path = f"{name}.{number.group(1)}"
                parts[path][converter.source_patterns.index(pattern)] = key.removesuffix(".weight")
                blocks[path] = len(converter.source_patterns)
    joined = {new: _joined(stored, found, blocks[new]) for new, found in parts.items()}
    gone = {p for found in parts.values() for p in found.values()}
    return replace(
        stored,
        settings={p: s for p, s in stored.settings.items() if p not in gone}
        | {p: settings for p, (settings, _) in joined.items()},
        state={p: stored.state[p] for p in stored.state if p not in gone}
        | {p: state for p, (_, state) in joined.items()},
    )


def _joined(stored: StoredAdapter, found: dict[int, str], blocks: int) -> tuple[LoRA, dict[str, Tensor]]:
    """One LoRA on the matrix whose blocks of rows have those at the paths `found`; a block without one stays."""
    settings: list[Any] = [stored.settings[p] for _, p in sorted(found.items())]
    downs, ups = zip(*((stored.state[p][A], stored.state[p][B]) for _, p in sorted(found.items())), strict=True)
    out, rank = len(ups[0]), sum(len(down) for down in downs)
    up = ups[0].new_zeros(blocks * out, rank)
    column = 0
    for place, own, block in zip(sorted(found), settings, ups, strict=True):
        up[place * out : (place + 1) * out, column : column + own.rank] = own.scale * block
        column += own.rank
    # The factors are in B: a LoRA of more ranks has another one for the same alpha.
    return LoRA(rank=rank, dropout=settings[0].dropout), {A: torch.cat(downs), B: up}
