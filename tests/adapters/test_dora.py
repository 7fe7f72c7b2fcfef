"""What is particular to DoRA: row lengths without B A, its gradient, its dropout, PEFT's files both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import settings as profile
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

import isotune
from isotune.adapters.low_rank.dora import DoRA, DoRAAdapter
from isotune.adapters.peft.dialect import dialect_of
from isotune.errors import OptionError, TargetError
from isotune.sites import require_site
from laws.suite import LAWS, check_law
from packed import NibbleLinear, pack
from peers import assert_both_ways, peft_adapt, peft_load
from support import adapted, assert_same_output, minilm, move, output, stories, tokens

LAYERS = {"linear": nn.Linear(7, 5), "conv1d": Conv1D(5, 7), "conv2d": nn.Conv2d(4, 6, 3, groups=2, padding=1),
          "embedding": nn.Embedding(9, 5)}  # fmt: skip
on_every_kind = pytest.mark.parametrize("kind", LAYERS)


def build(layer: nn.Module, moved: bool = True, **options: Any) -> Any:
    adapter = DoRA(**options).build(require_site(layer, "layer"), torch.Generator().manual_seed(0))
    return move(adapter, size=0.3) if moved else adapter.eval()


@on_every_kind
def test_every_row_has_the_learned_length_and_the_direction_of_the_low_rank_sum(kind: str) -> None:
    W = require_site(LAYERS[kind], "").weight
    adapter = build(LAYERS[kind], rank=2, alpha=3.0)
    changed = adapter.weight(W)
    torch.testing.assert_close(changed.norm(dim=1), adapter.magnitude.abs())
    V = W + 1.5 * adapter.product.B @ adapter.product.A
    torch.testing.assert_close(changed / adapter.magnitude[:, None], V / V.norm(dim=1, keepdim=True))


def test_start_is_the_length_of_each_row() -> None:
    layer = nn.Linear(7, 5)
    adapter = build(layer, moved=False, rank=2)
    torch.testing.assert_close(adapter.magnitude.detach(), layer.weight.detach().norm(dim=1))
    torch.testing.assert_close(adapter.weight(layer.weight), layer.weight)


@pytest.mark.parametrize("kind", ["linear", "gpt2_conv1d", "convolution", "embedding"])
@pytest.mark.parametrize("law", ["gradients_are_derivatives", "forward_equals_reference"])
def test_without_the_detached_norm_the_gradient_is_the_derivative(kind: str, law: str) -> None:
    assert law in LAWS
    check_law(DoRA, kind, law, st.just(DoRA(rank=2, detach_norm=False)))


def test_detached_norm_gives_the_derivative_at_constant_row_lengths() -> None:
    layer, x = nn.Linear(7, 5).double(), torch.randn(4, 7, dtype=torch.float64)
    adapter = build(layer, rank=2).double()
    site = require_site(layer, "")
    (adapter(x, site) * torch.arange(5.0)).sum().backward()
    B, A, m = adapter.product.B, adapter.product.A, adapter.magnitude
    got = [t.grad.clone() for t in (B, A, m)]
    adapter.zero_grad()
    V = layer.weight.detach() + B @ A
    W = (m / V.detach().norm(dim=1))[:, None] * V
    (nn.functional.linear(x, W, layer.bias) * torch.arange(5.0)).sum().backward()
    for gradient, t in zip(got, (B, A, m), strict=True):
        torch.testing.assert_close(gradient, t.grad)
    adapter.zero_grad()
    adapter.detach_norm = False
    (adapter(x, site) * torch.arange(5.0)).sum().backward()
    assert not torch.allclose(got[0], B.grad)


def test_what_inference_mode_kept_does_not_get_in_the_way_of_training() -> None:
    layer, x = nn.Linear(7, 5), torch.randn(4, 7)
    adapter, site = build(layer, rank=2, detach_norm=False), require_site(layer, "")
    with torch.inference_mode():
        expected = adapter(x, site).clone()
    y = adapter(x, site)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in adapter.parameters())


def test_base_that_can_be_dequantised_trains_and_one_that_cannot_is_refused() -> None:
    model = isotune.adapt(pack(stories(), "torchao"), DoRA(rank=4), "all-linear", seed=0)
    assert_same_output(output(model), output(pack(stories(), "torchao")))
    batch = tokens(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with pytest.raises(TargetError, match=r"NibbleLinear \(64 -> 64\) is packed.*unquantised base"):
        isotune.adapt(pack(stories(), NibbleLinear), DoRA(rank=4), "all-linear")


@profile(max_examples=5)
@given(st.integers(1, 8), st.integers(1, 32), st.booleans(), st.integers(0, 99))
def test_drawn_options_mean_the_same_in_peft_both_ways(
    tmp_path_factory: pytest.TempPathFactory, rank: int, alpha: int, rslora: bool, seed: int
) -> None:
    targets = ["q_proj", "down_proj"]
    method = DoRA(rank=rank, alpha=alpha, rslora=rslora)
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        use_rslora=rslora,
        use_dora=True,
        target_modules=targets,
        alpha_pattern={"q_proj": 3},
    )
    ours, theirs = adapted(stories(), method, targets, seed=seed), peft_adapt(stories(), config, seed)
    assert_both_ways(ours, theirs, stories, tmp_path_factory.mktemp("dora"))


def test_peft_and_isotune_agree_on_minilm_and_on_its_embeddings(tmp_path: Path) -> None:
    targets = ["query", "dense", "word_embeddings"]
    ours = adapted(minilm(), DoRA(rank=4), targets, size=0.02)
    theirs = peft_adapt(minilm(), peft.LoraConfig(r=4, use_dora=True, target_modules=targets), size=0.02)
    assert_both_ways(ours, theirs, minilm, tmp_path)


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"bias": False}], ids=str)
def test_convolutions_go_both_ways(options: dict[str, Any], tmp_path: Path) -> None:
    def convolution() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(3, 6, 3, **options), nn.ReLU(), nn.Conv2d(6, 4, 1)).eval()

    x = torch.randn(2, 3, 9, 9)
    model = adapted(convolution(), DoRA(rank=2), ["0", "2"])
    isotune.save(model, tmp_path / "ours")
    theirs = peft_load(convolution(), tmp_path / "ours")
    assert_same_output(theirs(x), model(x))
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = isotune.load(convolution(), tmp_path / "theirs")
    assert isinstance(loaded[0].isotune["default"], DoRAAdapter)
    assert_same_output(loaded(x), model(x))


def test_gradients_are_those_of_peft() -> None:
    base = nn.Sequential(nn.Linear(12, 9))
    theirs = peft_adapt(nn.Sequential(nn.Linear(12, 9)), peft.LoraConfig(r=3, use_dora=True, target_modules=["0"]))
    layer = theirs.base_model.model[0]
    base[0].load_state_dict(layer.base_layer.state_dict())
    ours = isotune.adapt(base, DoRA(rank=3), ["0"])
    adapter = ours[0].isotune["default"]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    m, scale = layer.lora_magnitude_vector["default"].weight, layer.scaling["default"]
    pairs = [(adapter.product.A, A), (adapter.product.B, B), (adapter.magnitude, m)]
    adapter.product.scale = scale
    for mine, peer in pairs:
        mine.data.copy_(peer.data)
    x = torch.randn(20, 12)
    for model in (ours, theirs):
        model(x).square().sum().backward()
    for mine, peer in pairs:
        assert_same_output(mine.grad, peer.grad)


def test_dropout_falls_on_the_low_rank_path_only_where_peft_drops_inputs_of_the_layer_too() -> None:
    x = torch.randn(64, 12)
    ours = isotune.adapt(nn.Sequential(nn.Linear(12, 9)), DoRA(rank=3, dropout=0.5), ["0"])
    theirs = peft_adapt(
        nn.Sequential(nn.Linear(12, 9)),
        peft.LoraConfig(r=3, lora_dropout=0.5, use_dora=True, target_modules=["0"]),
        size=0,
    )
    # With B = 0 nothing of the low-rank path is left to drop; the magnitude is off its start.
    ours[0].isotune["default"].magnitude.data.mul_(2)
    theirs.base_model.model[0].lora_magnitude_vector["default"].weight.data.mul_(2)
    assert torch.equal(ours.train()(x), ours.eval()(x))
    assert not torch.allclose(theirs.train()(x), theirs.eval()(x), atol=0.1)


def test_zero_row_stays_zero_where_peft_gives_nan() -> None:
    layers = [nn.Linear(12, 9), nn.Linear(12, 9)]
    for layer in layers:
        layer.weight.data[4] = 0
    ours = isotune.adapt(nn.Sequential(layers[0]), DoRA(rank=3), ["0"])
    theirs = peft_adapt(nn.Sequential(layers[1]), peft.LoraConfig(r=3, use_dora=True, target_modules=["0"]), size=0)
    x = torch.randn(3, 12)
    assert theirs(x)[:, 4].isnan().all()
    torch.testing.assert_close(ours(x), layers[0](x))
    ours(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters() if p.requires_grad)


def test_stored_dora_is_claimed_before_lora_and_lora_itself_stays_lora(tmp_path: Path) -> None:
    for use_dora, name in ((True, "dora"), (False, "lora")):
        config = peft.LoraConfig(r=4, use_dora=use_dora, target_modules=["q_proj"])
        peft_adapt(stories(), config).save_pretrained(tmp_path / name)
        loaded = isotune.load(stories(), tmp_path / name)
        layers = [m for _, m in isotune.model.names.adapted_layers(loaded)]
        assert {layer.isotune.settings["default"].name for layer in layers} == {name}


def test_other_variants_of_lora_with_dora_are_refused_by_name() -> None:
    config = {"r": 4, "lora_alpha": 4, "use_dora": True, "lora_bias": True}
    with pytest.raises(OptionError, match="dora: this PEFT adapter uses lora_bias=True, which dora cannot express"):
        dialect_of(DoRA).read(config, "query")


def test_lora_export_is_refused_and_pefts_layout_is_not(tmp_path: Path) -> None:
    model = adapted(stories(), DoRA(rank=4), ["q_proj"])
    with pytest.raises(isotune.errors.NoLowRankFormError, match="dora has no exact low-rank form"):
        isotune.export_lora(model, tmp_path / "lora")
    isotune.save(model, tmp_path / "adapter")
    from isotune.checkpoint.export_peft import export_peft

    export_peft(tmp_path / "adapter", tmp_path / "peft")
    assert_same_output(output(peft_load(stories(), tmp_path / "peft")), output(model))
