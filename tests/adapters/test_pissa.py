"""What is particular to PiSSA, and to every method that trains a thin part of W over an untouched base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import settings as profile
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import isotune
from isotune.adapters.spectral.pissa import PiSSA
from isotune.errors import OptionError
from isotune.sites import require_site
from spectral import build, gpt2, linear, peft_adapt, peft_load, peft_save, started
from support import STORIES, adapted, assert_same_output, minilm, move, output, stories

ATTENTION = ["q_proj", "o_proj", "down_proj"]
STARTS = {
    "pissa": PiSSA(rank=4),
    "pissa scaled": PiSSA(rank=4, alpha=10),
    "pissa rslora": PiSSA(rank=4, alpha=10, rslora=True),
    "pissa fast": PiSSA(rank=4, niter=2),
    "olora": isotune.method("olora", rank=4, alpha=6),
    "sorsa": isotune.method("sorsa", rank=4, alpha=6),
    "corda": isotune.method("corda", rank=4, alpha=6),
    "corda least": isotune.method("corda", rank=4, mode="kpm", sigma_fuse="V"),
}
every_start = pytest.mark.parametrize("method", STARTS)


@pytest.mark.parametrize("options", [{}, {"alpha": 10.0}, {"alpha": 10.0, "rslora": True}, {"niter": 16}], ids=str)
def test_what_is_left_of_w_has_its_smaller_singular_values(options: dict[str, Any]) -> None:
    layer = linear()
    adapter = build(PiSSA(rank=4, **options), layer)
    S = torch.linalg.svdvals(layer.weight)
    torch.testing.assert_close(torch.linalg.svdvals(started(adapter))[:4], S[:4], rtol=1e-5, atol=1e-5)
    rest = torch.linalg.svdvals(layer.weight - started(adapter))
    torch.testing.assert_close(rest[:5], S[4:], rtol=1e-5, atol=1e-5)
    # Both sides carry the same share of the singular values.
    torch.testing.assert_close(adapter.A0.norm(dim=1), adapter.B0.norm(dim=0), rtol=1e-5, atol=1e-5)


@every_start
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_before_training_the_layer_answers_with_the_same_bits(method: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    layer = nn.Linear(40, 24).to(dtype)
    adapter = build(STARTS[method], layer)
    x = torch.randn(50, 40).to(dtype)
    assert started(adapter).norm() > 0.1 * layer.weight.norm() * (method != "corda least")
    assert torch.equal(adapter(x, require_site(layer, "")), layer(x))
    assert torch.equal(adapter.weight(layer.weight), layer.weight)


@every_start
def test_a_small_step_is_not_lost_in_a_half_precision_layer(method: str) -> None:
    torch.manual_seed(1)
    exact, half = nn.Linear(64, 48), nn.Linear(64, 48).bfloat16()
    exact.weight.data = half.weight.float().data
    adapter = move(build(STARTS[method], exact), size=1e-5)
    B, A = adapter.factors(exact.weight)
    found, wanted = (t.detach() for t in (torch.linalg.multi_dot(adapter.factors(half.weight)), B @ A))
    assert (found.float() - wanted).norm() < 0.02 * wanted.norm()
    # As two products that are taken from each other it is.
    naive = started_in(adapter.left(), adapter.A, adapter.scale) - started_in(adapter.B0, adapter.A0, adapter.scale)
    assert (naive.float() - wanted).norm() > wanted.norm()


def started_in(B: Tensor, A: Tensor, scale: float) -> Tensor:
    """s B A in bfloat16."""
    return (scale * B.detach().bfloat16()) @ A.detach().bfloat16()


@every_start
def test_what_is_stored_is_a_plain_lora_of_twice_the_rank_that_keeps_the_scale(method: str, tmp_path: Path) -> None:
    model = adapted(stories(), STARTS[method], ATTENTION, size=0.02)
    isotune.save(model, tmp_path)
    loaded = peft_load(stories(), tmp_path)
    assert_same_output(output(loaded), output(model))
    assert loaded.peft_config["default"].r == 2 * STARTS[method].rank
    assert loaded.peft_config["default"].init_lora_weights is True
    with loaded.disable_adapter():
        assert torch.equal(output(loaded), output(stories()))
    # And back from PEFT it is a LoRA.
    again = isotune.load(stories(), peft_save(loaded, tmp_path / "again")).eval()
    assert_same_output(output(again), output(model))


@every_start
def test_loading_gives_every_tensor_back_to_the_bit_without_decomposing(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(stories(), STARTS[method], ATTENTION, size=0.02)
    isotune.save(model, tmp_path)
    for name in ("svd", "qr", "inv_ex"):
        monkeypatch.delattr(torch.linalg, name)
    loaded = isotune.load(stories(), tmp_path)
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.4.mlp.down_proj"):
        found, expected = (m.get_submodule(path).isotune["default"].state_dict() for m in (loaded, model))
        assert found.keys() == expected.keys() >= {"A", "B", "A0", "B0"}
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@every_start
def test_exports_as_one_exact_lora(method: str, tmp_path: Path) -> None:
    model = adapted(stories(), STARTS[method], ATTENTION, size=0.02)
    assert isotune.export_lora(model, tmp_path).residual < 1e-6
    assert_same_output(output(peft_load(stories(), tmp_path)), output(model))


@every_start
def test_a_rank_larger_than_the_layer_is_refused(method: str) -> None:
    settings = type(STARTS[method])(rank=10)
    with pytest.raises(OptionError, match="rank 10 is larger than the layer: its smaller side is 9; choose a rank"):
        build(settings, linear())


@every_start
def test_a_weight_with_values_that_are_not_finite_is_refused_by_name(method: str) -> None:
    model = nn.Sequential(linear())
    model[0].weight.data[1, 2] = float("nan")
    with pytest.raises(OptionError, match=r"at .0.: .* decomposes the weight, and this one holds"):
        isotune.adapt(model, STARTS[method], ["0"])


@profile(max_examples=5)
@given(
    st.integers(1, 8),
    st.integers(1, 32),
    st.booleans(),
    st.sets(st.sampled_from(["q_proj", "v_proj", "up_proj"]), min_size=1),
)
def test_isotune_loads_what_peft_saves(
    tmp_path_factory: pytest.TempPathFactory, rank: int, alpha: int, rslora: bool, targets: set[str]
) -> None:
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, use_rslora=rslora, init_lora_weights="pissa", target_modules=sorted(targets)
    )
    theirs = peft_adapt(stories(), config)
    folder = peft_save(theirs, tmp_path_factory.mktemp("drawn"))
    loaded = isotune.load(stories(), folder, trainable=True).eval()
    assert_same_output(output(loaded), output(theirs))
    settings = loaded.model.layers[0].get_submodule(where(targets)).isotune.settings["default"]
    assert settings == PiSSA(rank=rank, alpha=alpha, rslora=rslora)
    # It trains the same tensors as PEFT, and what isotune saves of it PEFT reads without a change to the base.
    assert sum(p.numel() for p in loaded.parameters() if p.requires_grad) == theirs.get_nb_trainable_parameters()[0]
    isotune.save(loaded, folder / "again")
    assert_same_output(output(peft_load(stories(), folder / "again")), output(theirs))


def test_pefts_folder_exports_as_a_lora_over_the_untouched_base(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights="pissa", target_modules=ATTENTION)
    theirs = peft_adapt(stories(), config)
    folder = peft_save(theirs, tmp_path / "theirs")
    assert isotune.export_lora(folder, tmp_path / "lora", base=STORIES).residual < 1e-6
    assert_same_output(output(peft_load(stories(), tmp_path / "lora")), output(theirs))


def where(targets: set[str]) -> str:
    return "mlp.up_proj" if targets == {"up_proj"} else f"self_attn.{min(targets - {'up_proj'})}"


def test_isotune_loads_what_peft_saves_of_minilm(tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=4, lora_alpha=7, init_lora_weights="pissa", target_modules=["query", "value"], rank_pattern={"value": 6}
    )
    theirs = peft_adapt(minilm(), config)
    loaded = isotune.load(minilm(), peft_save(theirs, tmp_path)).eval()
    assert_same_output(output(loaded), output(theirs))


def test_gpt2s_transposed_layers_go_both_ways(tmp_path: Path) -> None:
    targets = ["c_attn", "c_proj"]
    config = peft.LoraConfig(
        r=4, lora_alpha=6, init_lora_weights="pissa", target_modules=targets, fan_in_fan_out=True
    )
    theirs = peft_adapt(gpt2(), config)
    loaded = isotune.load(gpt2(), peft_save(theirs, tmp_path / "theirs")).eval()
    assert_same_output(output(loaded), output(theirs))
    model = adapted(gpt2(), PiSSA(rank=4, alpha=6), targets)
    isotune.save(model, tmp_path / "ours")
    assert_same_output(output(peft_load(gpt2(), tmp_path / "ours")), output(model))


@pytest.mark.parametrize("method", ["pissa", "olora", "sorsa", "corda"])
def test_convolutions_and_embeddings_are_plain_loras_to_peft(method: str, tmp_path: Path) -> None:
    def convolution() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1)).eval()

    x = torch.randn(2, 3, 9, 9)
    model = adapted(convolution(), isotune.method(method, rank=2), ["0", "2"])
    isotune.save(model, tmp_path / "convolution")
    assert_same_output(peft_load(convolution(), tmp_path / "convolution")(x), model(x))
    if method != "corda":
        model = adapted(minilm(), isotune.method(method, rank=2), ["position_embeddings"], size=0.01)
        isotune.save(model, tmp_path / "embedding")
        assert_same_output(output(peft_load(minilm(), tmp_path / "embedding")), output(model))


def test_peft_does_not_repeat_its_own_randomised_start_and_isotune_comes_no_less_near(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights="pissa_niter_16", target_modules=["query"])
    theirs = peft_adapt(minilm(), config)
    loaded = isotune.load(minilm(), peft_save(theirs, tmp_path)).eval()
    assert loaded.encoder.layer[0].attention.self.query.isotune.settings["default"] == PiSSA(
        rank=4, alpha=8, niter=16
    )
    torch.manual_seed(5)
    again = peft_load(minilm(), tmp_path)
    ours, itself = (float((output(m) - output(theirs)).norm() / output(theirs).norm()) for m in (loaded, again))
    assert itself > 0.01
    assert ours <= 1.2 * itself


def test_peft_loses_the_base_weight_and_isotune_does_not(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, init_lora_weights="pissa", target_modules=["query"])
    theirs = peft_adapt(minilm(), config)
    with theirs.disable_adapter():
        assert not torch.allclose(output(theirs), output(minilm()), atol=1e-2)
    loaded = isotune.load(minilm(), peft_save(theirs, tmp_path)).eval()
    with isotune.disabled(loaded):
        assert torch.equal(output(loaded), output(minilm()))
    assert torch.equal(output(isotune.remove(loaded)), output(minilm()))


def test_an_embedding_in_a_pissa_folder_of_peft_is_a_plain_lora_as_it_is_there(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, init_lora_weights="pissa", target_modules=["word_embeddings", "query"])
    theirs = peft_adapt(minilm(), config, size=0.01)
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    assert_same_output(output(isotune.load(minilm(), tmp_path).eval()), output(theirs))


def test_options_that_plain_lora_lacks_are_refused_in_a_pissa_folder_too(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, init_lora_weights="pissa", use_dora=True, target_modules=["query"])
    with pytest.raises(isotune.IsotuneError, match="use_dora=True"):
        isotune.load(minilm(), peft_save(peft_adapt(minilm(), config), tmp_path))


def test_the_randomised_start_repeats_with_its_seed_and_leaves_the_global_generator_alone() -> None:
    layer, state = linear(30, 20), torch.get_rng_state()
    one, same, other = (build(PiSSA(rank=3, niter=0), layer, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(one.A0, same.A0)
    assert not torch.equal(one.A0, other.A0)


def test_saved_tensors_are_the_four_matrices_and_nothing_else(tmp_path: Path) -> None:
    model = adapted(stories(), PiSSA(rank=4), ["q_proj"], size=0.02)
    isotune.save(model, tmp_path)
    adapter = model.model.layers[0].self_attn.q_proj.isotune["default"]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    assert {name for name in tensors if name.startswith(prefix)} == {f"{prefix}.lora_{m}.weight" for m in "AB"}
    assert torch.equal(tensors[f"{prefix}.lora_A.weight"], torch.cat([adapter.A, adapter.A0]))
    assert torch.equal(tensors[f"{prefix}.lora_B.weight"], torch.cat([adapter.B, -adapter.B0], dim=1))
