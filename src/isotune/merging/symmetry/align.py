"""Alignment by symmetry: the change of basis of one model that brings it closest to another.

Two models of one family may hold the same skill in different bases: neurons in another order, heads rotated. Before
a skill is added to another model (transfer.py) it is moved into that model's basis. The idea is that of "Leveraging
Parameter Space Symmetries for Reasoning Skill Transfer in LLMs", 2025, arXiv 2511.10850, of which no code is public;
the symmetries are in symmetry_maps.py, the arithmetic in symmetry_fit.py. Models that share an ancestor have the
same residual stream, which is not rotated.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from isotune.errors import CheckpointError, OptionError
from isotune.merging.symmetry.fit import Features, fit_attention, fit_mlp
from isotune.merging.symmetry.maps import Architecture, Distance, Symmetry, architecture, union
from isotune.quantised import DENSE

Mode = Literal["weights", "activations"]

_HALVES = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}
_FUSED = ("qkv_proj", "gate_up_proj", "query_key_value", "W_pack")


@torch.no_grad()
def align(
    source: Mapping[str, Tensor] | nn.Module,
    target: Mapping[str, Tensor] | nn.Module,
    config: Any,
    use: Collection[str] | None = None,
    mode: Mode = "weights",
    tokens: Tensor | None = None,
) -> Symmetry:
    """The symmetry that brings the source closest to the target.

    By weights, each half of a block ends no farther from the target than it was, in the Frobenius norm, and a source
    that is the target in another basis is brought back to it; one block at a time is read. By activations, what the
    halves of all blocks say on the tokens is in memory, of both models.

    Args:
        source: A model, or its tensors by name; a mapping that reads from disk will do.
        target: The model whose basis is wanted, of the same sizes.
        config: The configuration of either, as transformers has it or as a mapping.
        use: Some of "permutation", "value_output", "query_key" and "scale"; by default all that the models have.
        mode: "weights", or "activations", for which source and target are models that run.
        tokens: Token ids (rows, length) without padding, on which activations are compared: at least as many tokens
            as entries of a head, and better as many as neurons.

    Raises:
        OptionError: A kind of model or a symmetry that is not known, or activations asked of what does not run.
        CheckpointError: Tensors that are missing, fused, quantised, or of other sizes than the configuration says.
    """
    sizes = architecture(config)
    used = sizes.check(use)
    if mode == "activations":
        if not isinstance(source, nn.Module) or not isinstance(target, nn.Module) or tokens is None:
            raise OptionError("to align by activations give two models and tokens=... (token ids)")
        ours, theirs = (_activations(model, tokens, sizes) for model in (source, target))
        return union(
            [
                part
                for block in range(sizes.layers)
                for part in (
                    fit_attention(f"layers.{block}", ours[block], theirs[block], sizes, used, inverse_outputs=False),
                    fit_mlp(f"layers.{block}", ours[block], theirs[block], used),
                )
            ]
        )
    if mode != "weights":
        raise OptionError(f"mode {mode!r} is unknown; choose weights or activations")
    ours_by_name, theirs_by_name = (
        named(model.state_dict() if isinstance(model, nn.Module) else model) for model in (source, target)
    )
    return union(
        [
            _aligned(f"layers.{block}", half, ours_by_name, theirs_by_name, sizes, used)
            for block in range(sizes.layers)
            for half in _HALVES
        ]
    )


def named(state: Mapping[str, Tensor]) -> Callable[[str], Tensor | None]:
    """Access to the tensors of blocks, in their shapes, by their names from `layers.` on; None where there is none.

    Raises CheckpointError for fused projections.
    """
    names = {name[max(name.find("layers."), 0) :]: name for name in state}
    if fused := next((name for name in state if any(f".{part}." in name for part in _FUSED)), None):
        raise CheckpointError(
            f"the model stores the fused projection {fused!r}; alignment needs q_proj, k_proj, v_proj, gate_proj and "
            "up_proj as tensors of their own: convert the checkpoint first"
        )
    return lambda name: state[names[name]] if name in names else None


def _aligned(
    prefix: str,
    half: str,
    source: Callable[[str], Tensor | None],
    target: Callable[[str], Tensor | None],
    sizes: Architecture,
    used: frozenset[str],
) -> Symmetry:
    """One half of a block aligned by weights; the identity where rounding would leave it farther than it was."""
    ours, theirs = (_weights(tensor, prefix, half, sizes) for tensor in (source, target))
    for name, own in ours.items():
        if own.shape != theirs[name].shape:
            raise CheckpointError(f"only one of the two models has a bias at {prefix}.{half}.{name}; they do not fit")
    dtype = max((t.dtype for t in (*ours.values(), *theirs.values())), key=lambda dtype: dtype.itemsize)
    ours, theirs = ({name: W.to(dtype) for name, W in rows.items()} for rows in (ours, theirs))
    before = after = _distance(ours, theirs)
    found = Symmetry()
    if used:
        mlp = half == "mlp"
        fitted = fit_mlp(prefix, ours, theirs, used) if mlp else fit_attention(prefix, ours, theirs, sizes, used)
        maps = fitted.rows | fitted.columns
        moved = {name: maps[f"{prefix}.{half}.{name}"].rows(own) for name, own in ours.items()}
        if (distance := _distance(moved, theirs)) < before:
            found, after = fitted, distance
    found.distances[f"{prefix}.{half}"] = Distance(before, after)
    return found


def _weights(tensor: Callable[[str], Tensor | None], prefix: str, half: str, sizes: Architecture) -> Features:
    """The weights of one half of a block in fp32 or better, as rows for neurons or entries of heads.

    A bias on these rows is one more column; those of `o_proj` and `down_proj` belong to no neuron.
    """
    found = {}
    for name in _HALVES[half]:
        path = f"{prefix}.{half}.{name}"
        W, bias = tensor(f"{path}.weight"), tensor(f"{path}.bias")
        expected = sizes.shapes()[f"{half}.{name}"]
        if W is None:
            raise CheckpointError(f"the model has no tensor {path}.weight, which its configuration asks for")
        if tuple(W.shape) != expected:
            raise CheckpointError(f"{path}.weight is {tuple(W.shape)}, but the configuration says {expected}")
        if W.dtype not in DENSE:
            raise CheckpointError(f"{path}.weight is stored as {W.dtype}, quantised; use the unquantised model")
        if name in ("o_proj", "down_proj"):
            W = W.mT
        elif bias is not None:
            W = torch.cat([W, bias[:, None]], dim=1)
        found[name] = W.detach().to(torch.promote_types(W.dtype, torch.float32))
    return found


def _distance(one: Features, other: Features) -> float:
    return float(sum((own - other[name]).double().square().sum() for name, own in one.items())) ** 0.5


def _activations(model: nn.Module, tokens: Tensor, sizes: Architecture) -> list[Features]:
    """What is in the blocks on the tokens, as rows (entries, tokens): queries and keys before rotary positions.

    As `o_proj` stands the attention's output, as `up_proj` the product of gate and up, which scales as up does.
    """
    found: list[Features] = [{} for _ in range(sizes.layers)]
    hooks = []

    def keep(block: int, name: str, value: Tensor) -> None:
        found[block][name] = value.detach().flatten(0, -2).mT.to(torch.promote_types(value.dtype, torch.float32))

    for path, module in model.named_modules():
        parts = path.split(".")
        if len(parts) < 4 or parts[-4] != "layers" or parts[-2] not in _HALVES:
            continue
        block, name = int(parts[-3]), parts[-1]
        if name in ("q_proj", "k_proj", "v_proj"):
            hooks.append(module.register_forward_hook(lambda m, x, y, b=block, n=name: keep(b, n, y)))
        elif name in ("o_proj", "down_proj"):
            kept = "up_proj" if name == "down_proj" else name
            hooks.append(module.register_forward_pre_hook(lambda m, x, b=block, n=kept: keep(b, n, x[0])))
    training = model.training
    try:
        model.eval()(input_ids=tokens.to(next(model.parameters()).device), use_cache=False)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    for block, features in enumerate(found):
        if missing := {*_HALVES["self_attn"], "up_proj"} - features.keys():
            raise CheckpointError(f"block {block} of the model does not run {', '.join(sorted(missing))}")
    return found
