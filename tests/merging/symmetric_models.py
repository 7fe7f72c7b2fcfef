"""Random small models, and random changes of their basis."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from isotune.merging.symmetry.maps import Architecture, Symmetry, attention_maps, mlp_maps, union

SIZES = {
    "vocab_size": 50, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 6, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
KINDS = {
    "llama": (transformers.LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "mistral": (transformers.MistralConfig, {"sliding_window": 5}),
    "qwen2": (transformers.Qwen2Config, {}),
    "gemma": (transformers.GemmaConfig, {}),
    "gemma2": (transformers.Gemma2Config, {"query_pre_attn_scalar": 6, "attn_implementation": "eager"}),
    "qwen3": (transformers.Qwen3Config, {}),
}


def model_of(kind: str, seed: int = 0, **options: Any) -> Any:
    """A small model with random weights, biases and gains; two query heads for each key-value head."""
    make, own = KINDS[kind]
    model = transformers.AutoModelForCausalLM.from_config(make(**{**SIZES, **own, **options})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + 0.2 * noise if parameter.dim() == 1 else 0.15 * noise)
    return model


def drawn_symmetry(sizes: Architecture, use: Collection[str], seed: int = 0) -> Symmetry:
    """A random change of basis by the named symmetries."""
    generator = torch.Generator().manual_seed(seed)

    def order(n: int) -> Tensor:
        return torch.randperm(n, generator=generator) if "permutation" in use else torch.arange(n)

    def scale(*shape: int) -> Tensor:
        found = 0.5 + 1.5 * torch.rand(*shape, generator=generator, dtype=torch.float64)
        return found if "scale" in use else torch.ones_like(found)

    parts = []
    groups, d = sizes.groups, sizes.head
    repeats = sizes.heads // groups
    for layer in range(sizes.layers):
        of_groups = order(groups)
        heads = torch.cat([group * repeats + order(repeats) for group in of_groups])
        values = torch.linalg.qr(torch.randn(groups, d, d, generator=generator, dtype=torch.float64))[0]
        if "value_output" not in use:
            values = torch.eye(d, dtype=torch.float64).repeat(groups, 1, 1)
        angles = 6.28 * torch.rand(groups, d // 2, generator=generator, dtype=torch.float64)
        pairs = torch.polar(torch.ones_like(angles), angles if "query_key" in use else torch.zeros_like(angles))
        if "query_key" in sizes.symmetries:
            pairs = pairs * scale(groups, d // 2)
        signs = torch.randn(sizes.width, generator=generator, dtype=torch.float64).sign()
        neurons = scale(sizes.width) * (signs if "scale" in use else 1)
        parts.append(attention_maps(f"layers.{layer}", of_groups, heads, d, values * scale(groups, 1, 1), pairs))
        parts.append(mlp_maps(f"layers.{layer}", order(sizes.width), neurons))
    return union(parts)


def twin(model: nn.Module, symmetry: Symmetry) -> Any:
    """The same model in another basis."""
    other = copy.deepcopy(model)
    other.load_state_dict(symmetry.apply(model.state_dict()))
    return other


def distance(one: nn.Module, other: nn.Module) -> float:
    """Between all weights, in the Frobenius norm."""
    return different(one, other, "")


def different(one: nn.Module, other: nn.Module, *names: str) -> float:
    """The same for the tensors in whose names one of `names` occurs."""
    theirs = other.state_dict()
    return sum(
        float((tensor.double() - theirs[key].double()).square().sum())
        for key, tensor in one.state_dict().items()
        if any(name in key for name in names)
    ) ** 0.5  # fmt: skip
