"""Changes of basis inside the blocks of Llama-like models that leave what the model computes as it is.

A block of a model with RMSNorm, rotary positions (RoPE) in half-split pairs, grouped-query attention and a gated MLP
computes the same for any permutation P, nonzero diagonal D, invertible R and complex z per rotary pair:

    MLP            gate -> P gate      up -> D P up        down -> down Pᵀ D⁻¹
    value, output  V_g -> R_g V_g      O_h -> O_h R_g⁻¹    (h any query head of the key-value group g)
    query, key     K_g -> z_g K_g      Q_h -> Q_h / z̄_g    (rows of a head as complex pairs)

and for a permutation of the groups, and of the query heads within a group. Biases of rows are changed with them. Each
map of rows is block-diagonal behind a permutation; the map of what meets it is its inverse transposed, in the same
form. Cost of applying it: 2 d values of one head for each value of a weight, nothing for permutations.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from isotune.errors import OptionError, nearest
from isotune.linalg.factorised import inv
from isotune.linalg.low_rank import Factored

SYMMETRIES = ("permutation", "value_output", "query_key", "scale")
ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "llama": SYMMETRIES,
    "mistral": SYMMETRIES,
    "qwen2": SYMMETRIES,
    "gemma": SYMMETRIES,
    "gemma2": SYMMETRIES,
    # Queries and keys are normalised for themselves, with one gain for each of their entries.
    "qwen3": ("permutation", "value_output", "scale"),
}
"""The kinds of model (`model_type`) whose blocks are known, with the symmetries that they have."""

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)$")


@dataclass(frozen=True)
class Blocks:
    """The map `x -> diag(M_1, …, M_k) P x` of n rows; where n is a multiple of k d, each M serves a run of blocks."""

    order: Tensor
    """The permutation (n): row i of P x is row `order[i]` of x."""
    matrices: Tensor | None = None
    """The invertible M (k, d, d) in float64; None for the permutation alone."""

    def rows(self, W: Tensor) -> Tensor:
        """The map on the rows of W (n, m), or on the entries of a vector (n), in the dtype of W."""
        moved = W[self.order.to(W.device)]
        if self.matrices is None:
            return moved
        k, d, _ = self.matrices.shape
        # Half precision is not enough for a rotation and its inverse to cancel.
        exact = torch.promote_types(W.dtype, torch.float32)
        M = self.matrices.to(W.device, exact)
        if d == 1:
            found = moved.to(exact).view(k, -1) * M.view(k, 1)
        else:
            found = M[:, None] @ moved.to(exact).view(k, len(moved) // (k * d), d, -1)
        return found.reshape(W.shape).to(W.dtype)

    def columns(self, W: Tensor) -> Tensor:
        """The map on the columns of W (m, n): `W -> W (diag(M) P)ᵀ`."""
        return self.rows(W.mT).mT

    def meeting(self, order: Tensor | None = None) -> Blocks:
        """The inverse transposed, for what is multiplied with these rows; `order` (k) where it has more rows.

        Columns mapped by it, `W -> W (diag(M) P)⁻¹`, undo this map.
        """
        inverse = None if self.matrices is None else inv(self.matrices).mT
        return Blocks(self.order if order is None else order, inverse)


@dataclass(frozen=True)
class Architecture:
    """The sizes of a model's blocks."""

    model_type: str
    layers: int
    hidden: int
    width: int
    """Neurons of the MLP."""
    heads: int
    """Query heads."""
    groups: int
    """Key-value heads."""
    head: int
    """Entries of a head."""
    symmetries: tuple[str, ...] = SYMMETRIES

    def shapes(self) -> dict[str, tuple[int, int]]:
        """The shape of every weight of a block, by the name of its layer there."""
        queries, keys = self.heads * self.head, self.groups * self.head
        return {
            "self_attn.q_proj": (queries, self.hidden),
            "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden),
            "self_attn.o_proj": (self.hidden, queries),
            "mlp.gate_proj": (self.width, self.hidden),
            "mlp.up_proj": (self.width, self.hidden),
            "mlp.down_proj": (self.hidden, self.width),
        }

    def check(self, use: Any) -> frozenset[str]:
        """The names of symmetries in `use`, all that the model has for None. Raises OptionError for others."""
        if use is None:
            return frozenset(self.symmetries)
        names = frozenset([use] if isinstance(use, str) else use)
        for name in sorted(names):
            if name not in SYMMETRIES:
                raise OptionError(
                    f"unknown symmetry {name!r}.{nearest(name, SYMMETRIES)} They are: {', '.join(SYMMETRIES)}."
                )
            if name not in self.symmetries:
                raise OptionError(
                    f"models of type {self.model_type} have no symmetry {name!r}; they have: "
                    f"{', '.join(self.symmetries)}"
                )
        return names


def architecture(config: Any) -> Architecture:
    """The sizes that a model's configuration tells, a transformers one or its `config.json` as a mapping.

    Raises OptionError for a kind of model whose symmetries are not known.
    """
    fields: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
    kind = str(fields.get("model_type"))
    if kind not in ARCHITECTURES:
        raise OptionError(
            f"the symmetries of models of type {kind!r} are not known; they are for: {', '.join(ARCHITECTURES)}. "
            "Merge such models without alignment (isotune merge)"
        )
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if (fields.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1) != 1:
        raise OptionError(
            f"this {kind} model rotates only a part of each head (partial_rotary_factor), not supported"
        )
    needed = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    if missing := [name for name in needed if not fields.get(name)]:
        raise OptionError(f"the configuration of this {kind} model does not tell {', '.join(missing)}")
    heads = int(fields["num_attention_heads"])
    return Architecture(
        kind,
        int(fields["num_hidden_layers"]),
        int(fields["hidden_size"]),
        int(fields["intermediate_size"]),
        heads,
        int(fields.get("num_key_value_heads") or heads),
        int(fields.get("head_dim") or int(fields["hidden_size"]) // heads),
        ARCHITECTURES[kind],
    )


@dataclass(frozen=True)
class Distance:
    """How far the source is from the target before and after alignment, in the Frobenius norm."""

    before: float
    after: float


@dataclass(frozen=True)
class Symmetry:
    """A change of basis of a whole model, linear in its weights: `apply(a) - apply(b)` is that of `a - b`.

    Layers that are not named stay as they are; embeddings, norms and the head always do.
    """

    rows: dict[str, Blocks] = field(default_factory=dict)
    """What happens to a layer's outputs, by name (`layers.0.mlp.up_proj`)."""
    columns: dict[str, Blocks] = field(default_factory=dict)
    """What happens to a layer's inputs."""
    distances: dict[str, Distance] = field(default_factory=dict)
    """By half of a block (`layers.0.mlp`): of the weights where they were aligned by weights, else empty."""

    def apply_tensor(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor of that name (`model.layers.0.mlp.up_proj.weight`) in the new basis, in its shape."""
        path, _, kind = name.rpartition(".")
        rows, columns = self._of(path)
        if rows is not None and kind in ("weight", "bias"):
            tensor = rows.rows(tensor)
        if columns is not None and kind == "weight":
            tensor = columns.columns(tensor)
        return tensor

    def apply(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All tensors of a model's state in the new basis; the ones that do not change are the same objects."""
        return {name: self.apply_tensor(name, tensor) for name, tensor in state.items()}

    def apply_change(self, path: str, change: Factored) -> Factored:
        """The low-rank change of the weight of the layer at `path`, in the new basis and of the same rank."""
        rows, columns = self._of(path)
        return Factored(
            change.B if rows is None else rows.rows(change.B),
            change.A if columns is None else columns.columns(change.A),
        )

    def _of(self, path: str) -> tuple[Blocks | None, Blocks | None]:
        found = _LAYER.search(path)
        key = f"layers.{found[1]}.{found[2]}" if found else ""
        return self.rows.get(key), self.columns.get(key)


def attention_maps(
    prefix: str,
    groups: Tensor,
    heads: Tensor,
    head: int,
    values: Tensor | None = None,
    pairs: Tensor | None = None,
) -> Symmetry:
    """The symmetry of one block's attention.

    Args:
        prefix: The block, `layers.0`.
        groups: The new order of the key-value heads (g).
        heads: The new order of the query heads (h), those of a group together.
        head: Entries of a head, d.
        values: An invertible matrix (g, d, d) on the values of each group, float64.
        pairs: A nonzero complex number (g, d / 2) on each rotary pair of each group's keys, complex128.
    """
    entries = torch.arange(head)
    keys, queries = ((order[:, None] * head + entries).flatten() for order in (groups, heads))
    rotary = None
    if pairs is not None:
        x, y = torch.diag_embed(pairs.real), torch.diag_embed(pairs.imag)
        rotary = torch.cat([torch.cat([x, -y], dim=-1), torch.cat([y, x], dim=-1)], dim=-2)
    on_keys, on_values = Blocks(keys, rotary), Blocks(keys, values)
    rows = {"k_proj": on_keys, "q_proj": on_keys.meeting(queries), "v_proj": on_values}
    return Symmetry(
        {f"{prefix}.self_attn.{name}": blocks for name, blocks in rows.items()},
        {f"{prefix}.self_attn.o_proj": on_values.meeting(queries)},
    )


def mlp_maps(prefix: str, order: Tensor, scale: Tensor | None = None) -> Symmetry:
    """The symmetry of one block's MLP: the new order (n) of its neurons, and a nonzero scale (n) on `up`, float64."""
    on_up = Blocks(order, None if scale is None else scale[:, None, None])
    return Symmetry(
        {f"{prefix}.mlp.gate_proj": Blocks(order), f"{prefix}.mlp.up_proj": on_up},
        {f"{prefix}.mlp.down_proj": on_up.meeting()},
    )


def union(parts: list[Symmetry]) -> Symmetry:
    """Symmetries of different layers as one."""
    whole = Symmetry()
    for part in parts:
        whole.rows.update(part.rows)
        whole.columns.update(part.columns)
        whole.distances.update(part.distances)
    return whole
