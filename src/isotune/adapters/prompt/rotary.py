"""What rotary position embeddings of transformers' models make of a key that lies some positions before the text."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from isotune.bare import bare_class


def turned_back(block: nn.Module, p: int) -> Tensor | None:
    """M (d, d), d the width of a head: keys k (..., d) of no position become `k M`, those of position -p.

    None where the attention in the block has no rotary embeddings, by the file of transformers that it comes from.
    """
    for module in block.modules():
        file, config = sys.modules.get(bare_class(module).__module__), getattr(module, "config", None)
        rotate = getattr(file, "apply_rotary_pos_emb", None)
        table = next((kind for name, kind in vars(file).items() if name.endswith("RotaryEmbedding")), None)
        if config is None or rotate is None or table is None:
            continue
        d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        eye = torch.eye(d)[None, None]
        rotary, ids = table(config), torch.full((1, d), -p)
        cos, sin = rotary(eye, ids, **_layer_type(rotary, module))
        return rotate(eye, eye, cos, sin)[1][0, 0] / getattr(rotary, "attention_scaling", 1.0)
    return None


def _layer_type(rotary: nn.Module, module: nn.Module) -> dict[str, Any]:
    """What models with several kinds of layer, such as Gemma 3, ask beside the positions."""
    if "layer_type" not in inspect.signature(rotary.forward).parameters:
        return {}
    config: Any = module.config
    return {"layer_type": config.layer_types[module.layer_idx]}
