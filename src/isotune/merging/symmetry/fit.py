"""The symmetry of one half of a block that brings a source closest to a target, in closed forms.

    neurons       the permutation with the largest Σ <gate_T, gate_S> + <up_T, up_S> + <down_T, down_S>
    values        R = polar(c V_T V_Sᵀ + Σ_h O_T,hᵀ O_S,h / c), and c from a quartic, in turns
    rotary pairs  the same with complex numbers in place of matrices
    heads         by what no rotation changes, <O_T V_T, O_S V_S> and <Q_Tᴴ K_T, Q_Sᴴ K_S>, or as they are

Where the best permutation depends on rotations or scales that are free, it is sought both as if they were fixed and
by what they leave alone; the closer of these and of none is kept, so that one symmetry more never ends farther away.

What is compared are rows: of weights, or of activations, one column a token. Cost: 6 width² columns flops for
neurons, 4 (heads head)² columns for heads where they may change places, and an assignment (linalg/assignment.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from isotune.linalg.assignment import assignment
from isotune.linalg.procrustes import best_scale, misfit, polar
from isotune.merging.symmetry.maps import Architecture, Symmetry, attention_maps, mlp_maps

Features = dict[str, Tensor]
"""By the last name of a layer (`q_proj`), what is compared: a row for every neuron, or entry of a head."""

_TURNS = 3


def fit_mlp(prefix: str, source: Features, target: Features, used: frozenset[str]) -> Symmetry:
    """The symmetry of the MLP of the block `prefix` that brings source closest to target.

    Of the rows of `gate_proj`, `up_proj` and `down_proj` (transposed) the first and the last may be left out: those
    of `up_proj` are what scales with a neuron, those of `down_proj` what scales inversely.
    """
    fixed, co, contra = (_products(target, source, name) for name in ("gate_proj", "up_proj", "down_proj"))
    a, e = _squares(source, "up_proj"), _squares(source, "down_proj")
    n = len(a)
    orders = [torch.arange(n)]
    if "permutation" in used:
        orders.append(assignment(fixed + co + contra))
        if "scale" in used:
            # Neurons that are as long in `up` as in `down` leave no scale free but a sign.
            unit = _unit(_squares(target, "up_proj"), _squares(target, "down_proj"))[:, None] * _unit(a, e)
            unit = unit.to(co)
            orders.append(assignment(fixed + (co * unit + contra / unit).abs()))
    found: list[tuple[float, Symmetry]] = []
    for order in orders:
        pairs = (x.expand(n, n).gather(1, order[:, None].to(x.device)) for x in (fixed, co, contra))
        g, b, f = (x[:, 0].cpu().double() for x in pairs)
        terms = (a[order], b, e[order], f)
        scale = best_scale(*terms, signed=True) if "scale" in used else None
        left = misfit(torch.ones_like(a) if scale is None else scale, *terms) - 2 * g
        found.append((float(left.sum()), mlp_maps(prefix, order, scale)))
    return min(found, key=lambda one: one[0])[1]


def _products(target: Features, source: Features, name: str) -> Tensor:
    """The inner products (n, n) of target's and source's rows; a zero where the layer is not compared."""
    if name not in source:
        return source["up_proj"].new_zeros(1, 1)
    return target[name] @ source[name].mT


def _squares(features: Features, name: str) -> Tensor:
    """The squared length of every row (n, float64); zeros where the layer is not compared."""
    if name not in features:
        return torch.zeros(len(features["up_proj"]), dtype=torch.float64)
    return torch.linalg.vector_norm(features[name], dim=1).double().square().cpu()


def _unit(a: Tensor, e: Tensor) -> Tensor:
    """The scale with which `up` and `down` of a neuron are equally long, or `up` of length 1 where it is alone."""
    safe = a.where(a > 0, 1.0)
    return torch.where(e > 0, (e / safe) ** 0.25, safe**-0.5).where(a > 0, 1.0)


@dataclass(frozen=True)
class _Heads:
    """Products of two models' heads, on the CPU: Y Xᵀ of values (..., d, d) and Y Xᴴ of rotary pairs (..., d / 2).

    `...` is (groups, groups) or (heads, heads) for every head with every other, or just (groups) or (heads).
    """

    values: Tensor
    outputs: Tensor
    keys: Tensor
    queries: Tensor


def _heads(target: Features, source: Features, head: int, every: bool = False) -> _Heads:
    gh, out = ("h", "gh") if every else ("g", "g")

    def full(name: str) -> Tensor:
        Y, X = (rows[name].unflatten(0, (-1, head)) for rows in (target, source))
        return torch.einsum(f"gam,{gh}bm->{out}ab", Y, X).cpu().double()

    def paired(name: str) -> Tensor:
        halves = (rows[name].unflatten(0, (-1, 2, head // 2)) for rows in (target, source))
        Y, X = (torch.complex(rows[:, 0], rows[:, 1]) for rows in halves)
        return torch.einsum(f"gjm,{gh}jm->{out}j", Y, X.conj()).cpu().to(torch.complex128)

    return _Heads(full("v_proj"), full("o_proj"), paired("k_proj"), paired("q_proj"))


def fit_attention(
    prefix: str,
    source: Features,
    target: Features,
    sizes: Architecture,
    used: frozenset[str],
    inverse_outputs: bool = True,
) -> Symmetry:
    """The symmetry of the attention of the block `prefix` that brings source closest to target.

    The rows of `o_proj` are its weights, transposed, or with `inverse_outputs=False` its inputs: the weights take
    the inverse transposed of what values take, the inputs the same.
    """
    permutes = "permutation" in used
    cross = _heads(target, source, sizes.head, every=permutes)
    own = _heads(source, source, sizes.head)
    repeats = sizes.heads // sizes.groups
    of_groups, of_heads = torch.arange(sizes.groups), torch.arange(sizes.heads)
    orders = [(of_groups, of_heads)]
    if permutes:
        on_groups = _trace(cross.values) + cross.keys.real.sum(-1)
        orders.append(_matched(on_groups, _trace(cross.outputs) + cross.queries.real.sum(-1)))
        if used != {"permutation"}:
            likeness = _likeness(cross, own, _heads(target, target, sizes.head), repeats)
            orders.append(_matched(torch.zeros_like(on_groups), likeness))
    scales = "scale" in used
    scales_pairs = scales and "query_key" in sizes.symmetries
    found: list[tuple[float, Symmetry]] = []
    for groups, heads in orders:
        V, K, O, Q = cross.values, cross.keys, cross.outputs, cross.queries  # noqa: E741
        if permutes:
            V, K = (x[of_groups, groups] for x in (V, K))
            O, Q = (x[of_heads, heads] for x in (O, Q))  # noqa: E741
        O, Q = _summed(O, repeats), _summed(Q, repeats)  # noqa: E741
        a, e = _trace(own.values)[groups], _summed(_trace(own.outputs)[heads], repeats)
        terms = (a, V, e, O) if inverse_outputs else (a + e, V + O, torch.zeros_like(e), torch.zeros_like(O))
        left, values = _fit(terms, "value_output" in used, scales)
        # A complex number on a pair is a unitary matrix of one entry, and its scale.
        terms = (own.keys.real[groups], _entry(K), _summed(own.queries.real[heads], repeats), _entry(Q))
        left_in_pairs, pairs = _fit(terms, "query_key" in used, scales_pairs)
        maps = attention_maps(
            prefix,
            groups,
            heads,
            sizes.head,
            values if scales or "value_output" in used else None,
            pairs[..., 0, 0] if scales_pairs or "query_key" in used else None,
        )
        found.append((left + left_in_pairs, maps))
    return min(found, key=lambda one: one[0])[1]


def _fit(terms: tuple[Tensor, Tensor, Tensor, Tensor], rotates: bool, scales: bool) -> tuple[float, Tensor]:
    """The unitary R times a positive s that minimise `|s R X - Y|² + |R P / s - Q|²`, and the part that they decide.

    `terms` are |X|² (k), Y Xᴴ (k, d, d), |P|² and Q Pᴴ. R and s are fitted in turns, from the best R for s = 1 and
    from the best s for R = 1, for each of the k the better.
    """
    a, C, e, D = terms
    one = torch.eye(C.shape[-1], dtype=C.dtype).expand(C.shape)

    def scale_for(R: Tensor) -> tuple[Tensor, Tensor]:
        b, f = ((R.conj() * x).real.sum((-2, -1)) for x in (C, D))
        s = best_scale(a, b, e, f) if scales else torch.ones_like(a)
        return s, misfit(s, a, b, e, f)

    s, left = scale_for(one)
    if not rotates:
        return float(left.sum()), one * s[..., None, None]
    best, least = one, torch.full_like(left, math.inf)
    for start in (torch.ones_like(s), s) if scales else (s,):
        s = start
        for _ in range(_TURNS if scales else 1):
            R = polar(C * s[..., None, None] + D / s[..., None, None])
            s, left = scale_for(R)
        best = torch.where((left < least)[..., None, None], R * s[..., None, None], best)
        least = torch.minimum(left, least)
    return float(least.sum()), best


def _likeness(cross: _Heads, source: _Heads, target: _Heads, repeats: int) -> Tensor:
    """How alike the query heads of target and source are (heads, heads), in any basis: a sum of two cosines."""
    V, K = (x.repeat_interleave(repeats, 0).repeat_interleave(repeats, 1) for x in (cross.values, cross.keys))
    found = torch.zeros(len(cross.queries), len(cross.queries), dtype=torch.float64)
    lengths = []
    for of in (target, source):
        values, keys = (x.repeat_interleave(repeats, 0) for x in (of.values, of.keys))
        lengths.append([(of.outputs * values).sum((-2, -1)), (of.queries * keys).real.sum(-1)])
    inner = (cross.outputs * V).sum((-2, -1)), (cross.queries.conj() * K).real.sum(-1)
    for products, long, wide in zip(inner, *lengths, strict=True):
        scale = (long[:, None] * wide).clamp_min(0).sqrt()
        found += products / scale.where(scale > 0, 1.0)
    return found


def _matched(on_groups: Tensor, on_heads: Tensor) -> tuple[Tensor, Tensor]:
    """The orders of groups and of query heads, those of a group kept together, with the largest sum of gains.

    Gains of groups are (groups, groups), of heads (heads, heads), target by source.
    """
    count = len(on_groups)
    repeats = len(on_heads) // count
    gains = on_heads.unflatten(0, (count, repeats)).unflatten(2, (count, repeats)).transpose(1, 2)
    inside = torch.stack([assignment(gain) for gain in gains.flatten(0, 1)]).unflatten(0, (count, count))
    within = gains.gather(-1, inside[..., None]).squeeze(-1).sum(-1)
    groups = assignment(on_groups + within)
    picked = inside[torch.arange(count), groups]
    return groups, (groups[:, None] * repeats + picked).flatten()


def _summed(x: Tensor, repeats: int) -> Tensor:
    """Sums over the query heads of each group, (heads, ...) to (groups, ...)."""
    return x.unflatten(0, (-1, repeats)).sum(1)


def _trace(x: Tensor) -> Tensor:
    return x.diagonal(dim1=-2, dim2=-1).sum(-1)


def _entry(x: Tensor) -> Tensor:
    """Numbers as matrices of one entry."""
    return x[..., None, None]
