"""What is particular to VeRA: two vectors for each layer, and random matrices that the layers share."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import settings as profile
from hypothesis import strategies as st
from torch import Tensor, nn

import isotune
from both_ways import assert_isotune_loads, assert_peft_loads, tiny_gpt2
from isotune.bare import bare
from isotune.checkpoint.files import CONFIG
from isotune.model.names import adapted_layers
from support import adapted, assert_same_output, minilm, output, stories

LAYERS = ["q_proj", "o_proj", "down_proj"]  # 64 x 64 and 64 x 172


def shared_of(model: nn.Module, name: str = "default") -> list[dict[str, Tensor]]:
    return [layer.isotune[name].shared.tensors() for _, layer in adapted_layers(model) if name in layer.isotune]


def vera(**options: Any) -> isotune.Settings:
    return isotune.method("vera", **{"rank": 12} | options)


def test_change_is_the_shared_matrices_cut_to_the_layer_and_scaled_by_the_vectors() -> None:
    model = adapted(stories(), vera(), LAYERS, size=0.3)
    for path, layer in adapted_layers(model):
        adapter, W = layer.isotune["default"], bare(layer, "weight")
        A, B = (adapter.shared[name] for name in ("vera_A", "vera_B"))
        assert (A.shape, B.shape) == ((12, 172), (64, 12))
        b, d = adapter.lambda_b, adapter.lambda_d
        expected = W + b.diag() @ B[: W.shape[0]] @ d.diag() @ A[:, : W.shape[1]]
        torch.testing.assert_close(adapter.weight(W), expected, msg=path)


def test_start_is_zero_and_the_given_number() -> None:
    model = isotune.adapt(stories(), vera(start=0.3), ["q_proj"])
    adapter = model.model.layers[0].self_attn.q_proj.isotune["default"]
    assert (adapter.lambda_b == 0).all()
    assert (adapter.lambda_d == 0.3).all()


def test_one_copy_of_the_matrices_serves_all_layers_also_after_conversions_and_copies() -> None:
    model = adapted(stories(), vera(), LAYERS)
    for twin in (model, copy.deepcopy(model), copy.deepcopy(model).double()):
        pointers = {name: {s[name].data_ptr() for s in shared_of(twin)} for name in ("vera_A", "vera_B")}
        assert all(len(found) == 1 for found in pointers.values())
        assert len(shared_of(twin)) == 15
    assert not any("vera_A" in name for name in model.state_dict())
    assert not any("vera_A" in name for name, _ in model.named_parameters())


def test_seed_decides_the_matrices_whatever_the_seed_of_the_adapter() -> None:
    one, same, other = (
        shared_of(isotune.adapt(stories(), vera(projection_seed=key), LAYERS, seed=seed))[0]["vera_A"]
        for key, seed in ((4, 0), (4, 1), (5, 0))
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:Specified to not save:UserWarning")
@profile(max_examples=4)
@given(st.integers(1, 80), st.integers(0, 9), st.booleans(), st.sampled_from([0.0, 0.5]))
def test_any_drawn_adapter_means_the_same_in_peft(
    tmp_path_factory: pytest.TempPathFactory, rank: int, key: int, save: bool, dropout: float
) -> None:
    folder = tmp_path_factory.mktemp("drawn")
    method = vera(rank=rank, projection_seed=key, save_projection=save, dropout=dropout, start=0.25)
    assert_peft_loads(stories, method, folder / "one", targets=LAYERS, size=0.3)
    config = peft.VeraConfig(
        r=rank, projection_prng_key=key, save_projection=save, vera_dropout=dropout, d_initial=0.25,
        target_modules=LAYERS,
    )  # fmt: skip
    model = assert_isotune_loads(stories, config, folder)
    assert model.model.layers[0].self_attn.q_proj.isotune.settings["default"] == method


@pytest.mark.filterwarnings("ignore:Specified to not save:UserWarning")
def test_minilm_and_the_transposed_layers_of_gpt2_go_both_ways(tmp_path: Path) -> None:
    targets = ["query", "intermediate.dense"]
    assert_peft_loads(minilm, vera(), tmp_path / "one", targets=targets, size=0.2)
    assert_isotune_loads(minilm, peft.VeraConfig(r=5, target_modules=targets), tmp_path)
    targets = ["c_attn", "c_proj"]
    assert_peft_loads(tiny_gpt2, vera(), tmp_path / "two", targets=targets, size=0.3)
    config = peft.VeraConfig(r=5, target_modules=targets, fan_in_fan_out=True, save_projection=False)
    assert_isotune_loads(tiny_gpt2, config, tmp_path / "gpt2")


def test_second_adapter_on_more_and_larger_layers_leaves_the_first_as_it_was_where_pefts_fails() -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))

    x = torch.randn(3, 6)
    theirs = peft.get_peft_model(base(), peft.VeraConfig(r=3, target_modules=["0"]))
    theirs.add_adapter("two", peft.VeraConfig(r=3, target_modules=["0", "1"]))
    theirs.set_adapter("two")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        theirs(x)
    model = adapted(base(), vera(rank=3), ["0"], size=0.5, name="one")
    one = model(x)
    adapted(model, vera(rank=3), ["0", "1"], size=0.5, name="two")
    two = model(x)
    alone = adapted(base(), vera(rank=3), ["0", "1"], size=0.5, name="two")
    assert_same_output(two, alone(x))
    assert torch.equal(isotune.use(model, "one")(x), one)
    isotune.remove(model, "one")
    assert torch.equal(isotune.use(model, "two")(x), two)


def test_overrides_that_would_need_other_matrices_are_refused_and_the_model_is_left_alone() -> None:
    model = stories()
    with pytest.raises(isotune.IsotuneError, match="vera shares vera_A, vera_B among all layers, so that overrides"):
        isotune.adapt(model, vera(), LAYERS, overrides={"q_proj": {"rank": 3}})
    assert not list(adapted_layers(model))


def test_layers_that_peft_does_not_adapt_are_saved_as_isotunes_own(tmp_path: Path) -> None:
    model = adapted(minilm(), vera(), ["word_embeddings", "query"], size=0.2)
    isotune.save(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["peft_type"] == "ISOTUNE_VERA"
    assert torch.equal(output(isotune.load(minilm(), tmp_path).eval()), output(model))
