"""What the tensors of a stored model are: weights of layers, embeddings, or the second name of a shared one.

The model class that config.json names says it best, built without memory. For a class that this transformers does
not know, names and shapes decide, and `model_type` whether weights are stored (in, out), as GPT-2's are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
"""Model types whose layers are transformers' Conv1D, which stores W as (in, out)."""

_LAYERS = (nn.Linear, _ConvNd, nn.MultiheadAttention, nn.RNNBase)
_NO_LAYER = re.compile(r"embed|\bw[tp]e\b|\bshared\b|norm|\bln_|\bpos")
_CONV1D_LAYER = re.compile(r"\b(c_attn|q_attn|c_proj|c_fc)\b")
_VOCABULARY = re.compile(r"embed|\bwte\b|\bshared\b|lm_head|\boutput\b|predictions|decoder|classifier")


@dataclass(frozen=True)
class Kinds:
    """By tensor name, as in the files."""

    matrices: frozenset[str] = frozenset()
    """Weights of linear layers and convolutions."""
    transposed: frozenset[str] = frozenset()
    """Those of them that are stored (in, out)."""
    tied: Mapping[str, str] = field(default_factory=dict)
    """Second names of a shared tensor, each with the name that it is stored under."""

    def path(self, name: str) -> str:
        """What a rule knows the tensor as: the layer's path for the weight of a layer, else its name."""
        return name.removesuffix(".weight") if name in self.matrices else name


def tensor_kinds(folder: Path, config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> Kinds:
    """The kinds of the floating-point tensors in a model folder, given their shapes by name."""
    model = _without_memory(folder, config)
    return _by_name(config, shapes) if model is None else _by_class(model, config, shapes)


def is_vocabulary(name: str, shape: Sequence[int], vocabulary: int) -> bool:
    """Whether each row belongs to a token: input embeddings, output heads and their biases."""
    return bool(shape) and shape[0] == vocabulary and _VOCABULARY.search(name) is not None


def _without_memory(folder: Path, config: Mapping[str, Any]) -> nn.Module | None:
    import transformers

    kind = getattr(transformers, str((config.get("architectures") or [""])[0]), None)
    if kind is None:
        return None
    try:
        with torch.device("meta"):
            return kind(transformers.AutoConfig.from_pretrained(folder))
    except Exception:  # a config that this version of transformers cannot build: names must do
        return None


def _by_class(model: Any, config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> Kinds:
    from transformers.pytorch_utils import Conv1D

    owners: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        owners |= {f"{path}.{name}".lstrip("."): module for name, _ in module.named_parameters(recurse=False)}
    names = _Names(owners)
    plain = _by_name(config, shapes)
    matrices, transposed = set(), set()
    for name, shape in shapes.items():
        owner = owners.get(names.own(name) or "")
        if owner is None:
            known = name in plain.matrices, name in plain.transposed
        else:
            turned = isinstance(owner, Conv1D | _ConvTransposeNd)
            layer = turned or isinstance(owner, _LAYERS)
            known = layer and len(shape) > 1, turned and len(shape) > 1
        if known[0]:
            matrices.add(name)
        if known[1]:
            transposed.add(name)
    stored = {own: name for name in shapes if (own := names.own(name))}
    pairs = getattr(model, "all_tied_weights_keys", {})
    tied = _one_level({stored.get(a, a): stored.get(b, b) for a, b in pairs.items()})
    return Kinds(frozenset(matrices), frozenset(transposed), tied)


def _by_name(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> Kinds:
    matrices = {
        name
        for name, shape in shapes.items()
        if name.endswith("weight") and len(shape) in (2, 4) and min(shape) > 0 and not _NO_LAYER.search(name)
    }
    conv1d = config.get("model_type") in CONV1D_MODELS
    transposed = {name for name in matrices if conv1d and _CONV1D_LAYER.search(name)}
    inputs = [name for name in shapes if re.search(r"\b(embed_tokens|wte|word_embeddings|shared)\.weight$", name)]
    tied = {"lm_head.weight": inputs[0]} if config.get("tie_word_embeddings") and len(inputs) == 1 else {}
    return Kinds(frozenset(matrices), frozenset(transposed), tied)


class _Names:
    """Stored names as the model's own: files may have a prefix, such as `bert.`, or lack one."""

    def __init__(self, own: Mapping[str, Any]) -> None:
        self._own = own
        self._prefixes = {name.partition(".")[0] for name in own}

    def own(self, name: str) -> str | None:
        if name in self._own:
            return name
        fitting = [f"{prefix}.{name}" for prefix in self._prefixes if f"{prefix}.{name}" in self._own]
        bare = name.partition(".")[2]
        return bare if bare in self._own else fitting[0] if len(fitting) == 1 else None


def _one_level(tied: Mapping[str, str]) -> dict[str, str]:
    """The same pairs, where a name that stands for another that stands for a third stands for the third."""
    found = {}
    for name, source in tied.items():
        for _ in tied:
            source = tied.get(source, source)
        if source != name:
            found[name] = source
    return found
