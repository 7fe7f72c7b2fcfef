"""How large the numbers that enter attention can get, before and after an adaptation, from the weights alone.

    |x Wᵀ + b| <= |x| σ_1(W) + max |b|,      |x (W + s dW)ᵀ + b| <= |x| (σ_1(W) + s σ_1(dW)) + max |b|
    |x| <= √d max |gain| + |bias|            for x from a normalisation in front of the layer
    rho = max(G_Q, G_K) / √(ln L)            for the bounds G of queries and keys, at a length of L tokens

Source: Hu, Su, Kuo, Song and Liu, "Computational Limits of Low-Rank Adaptation (LoRA) Fine-Tuning for Transformer
Models" (arXiv 2406.03136), in which the gradients of LoRA can be approximated in nearly linear time while these
numbers stay of smaller order than √(ln L), and cannot above an order of √(ln L), under the strong exponential time
hypothesis. Both are orders without their constants: rho says how an adaptation moves the numbers, not on which side
of a line a model of one size is. A large growth is worth knowing for another reason, low-precision attention.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from isotune.checkpoint.base import StoredBase
from isotune.diagnostics.sources import Source, open_source
from isotune.errors import CheckpointError, OptionError
from isotune.linalg.change import Change
from isotune.linalg.leading import leading_svd
from isotune.linalg.low_rank import Factored, svd
from isotune.linalg.precision import at_least_fp32

_LENGTH = 2048
_ROLES = {
    "query": {"q_proj", "query", "q_lin", "to_q", "wq"},
    "key": {"k_proj", "key", "k_lin", "to_k", "wk"},
    "value": {"v_proj", "value", "v_lin", "to_v", "wv"},
    "packed": {"c_attn", "qkv_proj", "query_key_value", "Wqkv", "qkv"},
}
_NORMS = ("input_layernorm", "ln_1", "norm1", "layernorm_before", "attention_norm")


def role_of(path: str) -> str | None:
    """Whether the layer at `path` makes queries, keys, values, or all three ("packed"); None for others."""
    last = path.rpartition(".")[2]
    return next((role for role, names in _ROLES.items() if last in names), None)


@dataclass(frozen=True)
class AttentionBound:
    """The bounds of one attention layer."""

    layer: str
    norm: str | None
    """The normalisation in front of it; None where none was found, and a gain of one is assumed."""
    input_norm: float
    """The bound of |x|."""
    before: dict[str, float]
    """By role (query, key, value, packed) the bound of the largest entry with the base's weights."""
    after: dict[str, float]
    """The same with the adaptation."""
    rho_before: float
    """max(query, key) / √(ln L)."""
    rho_after: float
    scale: float | None
    """With `rho_max`, the largest s for which `rho` of W + s dW stays within it (negative where W alone does not);
    None without it, or where queries and keys are not changed."""


def attention_bounds(
    source: str | Path,
    base: str | Path | None = None,
    *,
    length: int | None = None,
    input_norm: float | None = None,
    rho_max: float | None = None,
) -> list[AttentionBound]:
    """The bounds of every attention layer of the base, with and without the adaptation.

    Args:
        source: What `isotune.diagnostics.diagnose` takes.
        base: The base model; by default what the source names.
        length: L; by default the longest that the base's config names, else 2048.
        input_norm: The bound of |x|, where that of the normalisation is too loose.
        rho_max: Also find the scale at which rho reaches this.

    Raises:
        CheckpointError: No base at hand, or one without attention layers that are known by name.
        OptionError: A length, a norm or a rho that means nothing.
    """
    for name, value, least in (("length", length, 2), ("input_norm", input_norm, 0), ("rho_max", rho_max, 0)):
        if value is not None and (value < least or value == 0 or not math.isfinite(value)):
            raise OptionError(f"{name}={value:g} is not usable; it must be {'2 or more' if least else 'above 0'}")
    opened = open_source(source, base)
    if opened.base is None:
        raise CheckpointError(
            f"the bounds of {source} need the weights of its base, which are not at hand; "
            "name it with base=... (--base)"
        )
    weights = _Weights(opened.base)
    layers: dict[str, dict[str, str]] = {}
    for name in opened.base.file_of:
        path = name.removesuffix(".weight")
        if path != name and (role := role_of(path)):
            layers.setdefault(path.rpartition(".")[0], {})[role] = path
    if not layers:
        raise CheckpointError(
            f"no attention layer was found in {opened.base.folder}; they are known by the names of their "
            "projections, such as q_proj, query, c_attn"
        )
    root = math.sqrt(math.log(length or weights.length))
    return [_bound(layer, roles, opened, weights, root, input_norm, rho_max) for layer, roles in layers.items()]


def scale_to_bound(
    source: str | Path,
    rho_max: float,
    base: str | Path | None = None,
    *,
    length: int | None = None,
    input_norm: float | None = None,
) -> float | None:
    """The largest s for which the bound rho of `W + s dW` is at most `rho_max` at every layer, in closed form.

    Negative where a weight of the base alone is above it; None where no query or key is changed. Arguments and errors
    are those of `attention_bounds`.
    """
    found = attention_bounds(source, base, length=length, input_norm=input_norm, rho_max=rho_max)
    return min((own.scale for own in found if own.scale is not None), default=None)


class _Weights:
    """What the bounds need of the base."""

    def __init__(self, base: StoredBase) -> None:
        self.base = base
        config = base.config()
        self.length = int(config.get("max_position_embeddings") or config.get("n_positions") or _LENGTH)
        # Gemma's normalisations store their gain less one.
        self.offset = 1.0 if str(config.get("model_type", "")).startswith("gemma") else 0.0

    def normalisation(self, layer: str) -> str | None:
        """The path of what normalises the input of an attention layer."""
        parts = layer.split(".")
        places = [".".join([*parts[:end], norm]) for end in range(len(parts), 0, -1) for norm in _NORMS]
        if encoder := re.match(r"(.*?)encoder\.layer\.(\d+)\.attention\.self$", layer):
            # BERT normalises behind each block: the input is what the one before gave.
            front, number = encoder[1], int(encoder[2])
            places.append(
                f"{front}encoder.layer.{number - 1}.output.LayerNorm" if number else f"{front}embeddings.LayerNorm"
            )
        return next((place for place in places if f"{place}.weight" in self.base.file_of), None)

    def input_norm(self, norm: str | None, d: int) -> float:
        """The largest length of what a normalisation over d numbers gives."""
        if norm is None:
            return math.sqrt(d)
        gain, bias = self.base.weight(norm).float() + self.offset, self.base.bias(norm)
        return math.sqrt(d) * float(gain.abs().max()) + (0.0 if bias is None else float(bias.float().norm()))


@torch.no_grad()
def _bound(
    layer: str,
    roles: dict[str, str],
    source: Source,
    weights: _Weights,
    root: float,
    input_norm: float | None,
    rho_max: float | None,
) -> AttentionBound:
    norm = weights.normalisation(layer)
    before, after, scales = {}, {}, []
    for role, path in sorted(roles.items(), key=lambda own: list(_ROLES).index(own[0])):
        W, bias = at_least_fp32(weights.base.weight(path)), weights.base.bias(path)
        if W.dim() != 2:
            continue
        d = W.shape[0] if role == "packed" and path.endswith("c_attn") else W.shape[1]
        x = weights.input_norm(norm, d) if input_norm is None else input_norm
        shift = 0.0 if bias is None else float(bias.float().abs().max())
        sigma, moved = _largest(W), _moved(source, path)
        before[role] = x * sigma + shift
        after[role] = x * (sigma + moved) + shift
        if rho_max is not None and moved > 0 and role != "value":
            scales.append(((rho_max * root - shift) / x - sigma) / moved)
    rho_before, rho_after = (
        max((own[r] for r in own if r != "value"), default=0.0) / root for own in (before, after)
    )
    named, scale = norm if input_norm is None else None, min(scales, default=None)
    return AttentionBound(layer, named, x, before, after, rho_before, rho_after, scale)


def _moved(source: Source, path: str) -> float:
    """σ_1 of the change of the base's weight at `path`; 0 where it is not changed."""
    own = source.names.get(f"{path}.weight")
    change = None if own is None else source.at(own).change
    return 0.0 if change is None else _largest(change)


def _largest(matrix: Tensor | Change) -> float:
    S = svd(matrix).S if isinstance(matrix, Factored) else leading_svd(matrix, None, 1).S
    return float(S[0]) if len(S) else 0.0
