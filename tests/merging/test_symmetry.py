"""Alignment of models by their symmetries: what they compute stays, and a twin is brought back."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Iterable
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from isotune.errors import CheckpointError, OptionError
from isotune.linalg.low_rank import Factored
from isotune.merging.symmetry.align import align
from isotune.merging.symmetry.maps import (
    SYMMETRIES,
    architecture,
)
from merging.symmetric_models import KINDS, different, distance, drawn_symmetry, model_of, twin
from support import assert_same_output, output, stories


def subsets(of: Iterable[str]) -> list[tuple[str, ...]]:
    of = tuple(of)
    return [use for k in range(1, len(of) + 1) for use in itertools.combinations(of, k)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_symmetry_leaves_the_logits_as_they_are(kind: str) -> None:
    model = model_of(kind)
    sizes = architecture(model.config)
    expected = output(model)
    for use in [*((name,) for name in sizes.symmetries), sizes.symmetries]:
        moved = twin(model, drawn_symmetry(sizes, use))
        assert distance(moved, model) > 0.1
        assert_same_output(output(moved), expected)


def test_other_maps_do_not() -> None:
    model = model_of("llama")
    sizes = architecture(model.config)
    # A rotation of the values alone, queries that are not of their group, and pairs as neighbours.
    broken = drawn_symmetry(sizes, ["value_output"])
    broken.columns.clear()
    turned = drawn_symmetry(sizes, ["permutation"])
    turned.rows["layers.0.self_attn.q_proj"] = turned.rows["layers.1.self_attn.q_proj"]
    pairs = drawn_symmetry(sizes, ["query_key"])
    neighbours = torch.arange(sizes.head).view(2, -1).T.flatten()
    for name, blocks in pairs.rows.items():
        if name.endswith(("q_proj", "k_proj")) and blocks.matrices is not None:
            blocks.matrices.copy_(blocks.matrices[:, neighbours][:, :, neighbours])
    for symmetry in (broken, turned, pairs):
        assert (output(twin(model, symmetry)) - output(model)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_twin_is_brought_back_by_its_weights(kind: str) -> None:
    model = model_of(kind)
    sizes = architecture(model.config)
    uses = subsets(SYMMETRIES) if kind == "llama" else [sizes.symmetries]
    for use in uses:
        moved = twin(model, drawn_symmetry(sizes, use))
        symmetry = align(moved, model, model.config, use)
        assert distance(twin(moved, symmetry), model) < 1e-6 * distance(moved, model)
        assert sum(part.after for part in symmetry.distances.values()) < 1e-5


@pytest.mark.parametrize("use", [*((name,) for name in SYMMETRIES), SYMMETRIES])
def test_a_twin_is_brought_back_by_its_activations(use: tuple[str, ...]) -> None:
    model = model_of("llama").train()
    ids = torch.randint(model.config.vocab_size, (20, 30))
    moved = twin(model, drawn_symmetry(architecture(model.config), use))
    symmetry = align(moved, model, model.config, use, mode="activations", tokens=ids)
    assert distance(twin(moved, symmetry), model) < 1e-5 * distance(moved, model)
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_no_alignment_ends_farther_away_and_one_symmetry_more_never_does(kind: str) -> None:
    source, target = model_of(kind), model_of(kind, seed=1)
    sizes = architecture(source.config)
    found = {(): distance(source, target)}
    for use in subsets(sizes.symmetries):
        moved = twin(source, align(source, target, source.config, use))
        found[use] = distance(moved, target)
        assert_same_output(output(moved), output(source))
    for use, after in found.items():
        for less in itertools.combinations(use, max(len(use) - 1, 0)):
            assert after <= found[less] * (1 + 1e-6), (use, less)
    assert found[sizes.symmetries] < 0.95 * found[()]


def test_the_distances_told_are_those_of_the_weights() -> None:
    source, target = model_of("qwen2"), model_of("qwen2", seed=1)
    symmetry = align(source, target, source.config)
    assert len(symmetry.distances) == 4
    rest = different(source, target, "embed", "norm", "lm_head")
    for told, models in (("before", source), ("after", twin(source, symmetry))):
        square = sum(getattr(part, told) ** 2 for part in symmetry.distances.values())
        assert abs((square + rest**2) ** 0.5 / distance(models, target) - 1) < 1e-5


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_any_number_of_query_heads_may_share_a_group(groups: int) -> None:
    model = model_of("qwen2", num_key_value_heads=groups)
    sizes = architecture(model.config)
    moved = twin(model, drawn_symmetry(sizes, SYMMETRIES))
    assert_same_output(output(moved), output(model))
    assert distance(twin(moved, align(moved, model, model.config)), model) < 1e-6 * distance(moved, model)


def test_a_model_is_its_own_nearest() -> None:
    model = model_of("llama")
    symmetry = align(model, model, model.config)
    assert not symmetry.rows
    assert not symmetry.columns
    state = model.state_dict()
    assert all(tensor is state[name] for name, tensor in symmetry.apply(state).items())


@pytest.mark.parametrize("use", subsets(SYMMETRIES[:3]))
def test_without_scales_the_norm_of_every_change_stays(use: tuple[str, ...]) -> None:
    source, target = model_of("llama"), model_of("llama", seed=1)
    symmetry = align(source, target, source.config, use)
    assert symmetry.rows
    for name, tensor in source.state_dict().items():
        change = torch.randn_like(tensor)
        torch.testing.assert_close(symmetry.apply_tensor(name, change).norm(), change.norm())


def test_a_low_rank_change_moves_as_its_product() -> None:
    model = model_of("llama")
    symmetry = drawn_symmetry(architecture(model.config), SYMMETRIES)
    for name, tensor in model.named_parameters():
        if tensor.dim() == 2:
            change = Factored(torch.randn(tensor.shape[0], 3), torch.randn(3, tensor.shape[1]))
            path = f"model.{name.removesuffix('.weight')}"
            moved = symmetry.apply_change(path, change)
            assert moved.rank == 3
            torch.testing.assert_close(moved.dense(), symmetry.apply_tensor(name, change.dense()))


def test_half_precision_keeps_its_dtype_and_its_function() -> None:
    model = stories().bfloat16()
    moved = twin(model, drawn_symmetry(architecture(model.config), ["value_output", "query_key"]))
    assert all(tensor.dtype == torch.bfloat16 for tensor in moved.state_dict().values())
    assert_same_output(output(moved).float(), output(model).float(), 0.05)
    symmetry = align(moved, model, model.config)
    assert distance(twin(moved, symmetry), model) < 0.02 * distance(moved, model)


def test_a_drifted_twin_of_a_pretrained_model_is_found_again() -> None:
    model = stories()
    sizes = architecture(model.config)
    hidden = drawn_symmetry(sizes, SYMMETRIES[:3])
    drifted = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in drifted.parameters():
            parameter.add_(0.1 * parameter.std() * torch.randn(parameter.shape))
    target = twin(drifted, hidden)
    found = align(model, target, model.config, SYMMETRIES[:3])
    for name, blocks in hidden.rows.items():
        assert found.rows[name].order.equal(blocks.order), name
    assert distance(twin(model, found), target) < 1.05 * distance(model, drifted)


def test_dead_neurons_and_heads_do_no_harm() -> None:
    model, target = model_of("llama"), model_of("llama", seed=1)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight[:3] = 0
            layer.mlp.up_proj.bias[:3] = 0
            layer.mlp.down_proj.weight[:, 2:5] = 0
            layer.self_attn.v_proj.weight[: architecture(model.config).head] = 0
            layer.self_attn.q_proj.weight.zero_()
            layer.self_attn.q_proj.bias.zero_()
    symmetry = align(model, target, model.config)
    moved = twin(model, symmetry)
    assert distance(moved, target) < distance(model, target)
    assert_same_output(output(moved), output(model))


def test_what_cannot_be_aligned_is_refused() -> None:
    model = model_of("llama")
    config, state = model.config.to_dict(), model.state_dict()
    with pytest.raises(OptionError, match=r"type 'gpt2' are not known; they are for: llama, mistral, qwen2"):
        align(state, state, {"model_type": "gpt2"})
    with pytest.raises(OptionError, match="does not tell hidden_size"):
        align(state, state, config | {"hidden_size": None})
    with pytest.raises(OptionError, match="partial_rotary_factor"):
        align(state, state, config | {"rope_parameters": {"partial_rotary_factor": 0.5}})
    with pytest.raises(OptionError, match=r"unknown symmetry 'permutations'. Did you mean 'permutation'\?"):
        align(state, state, config, ["permutations"])
    with pytest.raises(OptionError, match="have no symmetry 'query_key'"):
        align(state, state, model_of("qwen3").config, "query_key")
    with pytest.raises(OptionError, match="mode 'weight' is unknown"):
        align(state, state, config, mode="weight")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="give two models and tokens"):
        align(state, state, config, mode="activations")
    with pytest.raises(CheckpointError, match=r"layers.0.mlp.gate_proj.weight is .* but the configuration says"):
        align(state, state, config | {"intermediate_size": 41})
    with pytest.raises(CheckpointError, match=r"no tensor layers.2.self_attn.q_proj.weight"):
        align(state, state, config | {"num_hidden_layers": 3})
    fused = state | {"model.layers.0.self_attn.qkv_proj.weight": torch.zeros(4, 4)}
    with pytest.raises(CheckpointError, match=r"fused projection 'model.layers.0.self_attn.qkv_proj.weight'"):
        align(fused, state, config)
    name = "model.layers.0.self_attn.k_proj"
    with pytest.raises(CheckpointError, match="quantised"):
        align(state | {f"{name}.weight": state[f"{name}.weight"].to(torch.int8)}, state, config)
    with pytest.raises(CheckpointError, match="only one of the two models has a bias"):
        align({key: tensor for key, tensor in state.items() if key != f"{name}.bias"}, state, config)


class Watched(dict[str, Tensor]):
    """Tensors that are made when they are read; `most` is how many were alive at once."""

    alive: ClassVar[list[weakref.ref[np.ndarray]]] = []
    most = 0

    def __getitem__(self, name: str) -> Tensor:
        memory = super().__getitem__(name).numpy().copy()  # lives as long as any view of the tensor
        Watched.alive = [ref for ref in Watched.alive if ref() is not None] + [weakref.ref(memory)]
        Watched.most = max(Watched.most, len(Watched.alive))
        return torch.from_numpy(memory)


def test_weights_are_read_half_a_block_at_a_time() -> None:
    source, target = (model_of("mistral", seed, num_hidden_layers=6) for seed in (0, 1))
    align(Watched(source.state_dict()), Watched(target.state_dict()), source.config)
    assert 2 * 3 <= Watched.most <= 2 * 4


def test_names_may_have_any_prefix() -> None:
    source, target = model_of("llama"), model_of("llama", seed=1)
    found = align(source.model, {f"wrapped.{k}": t for k, t in target.state_dict().items()}, source.config)
    expected = align(source, target, source.config)
    assert found.distances == expected.distances
    name = "layers.1.self_attn.o_proj.weight"
    tensor = source.model.state_dict()[name]
    assert found.apply_tensor(f"base.model.{name}", tensor).equal(expected.apply_tensor(f"model.{name}", tensor))
