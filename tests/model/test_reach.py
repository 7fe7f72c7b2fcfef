"""Models whose own code reaches into an adapted layer, half precision, and gradient checkpointing."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers
from torch import nn

import isotune
from isotune import HRA, LoRA, Settings
from support import adapted, assert_same_output, minilm, move, stories, tokens

METHODS = [HRA(rank=4), LoRA(rank=4)]
named = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


@named
def test_adapted_layer_answers_for_the_layer_with_the_adapted_weight(method: Settings) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
    W, b = model[0].weight, model[0].bias
    layer = adapted(model, method, ["0"])[0]
    assert (layer.in_features, layer.out_features) == (6, 4)
    assert layer.bias is b
    assert layer.weight.dtype == torch.float32
    x = torch.randn(5, 6)
    torch.testing.assert_close(nn.functional.linear(x, layer.weight, layer.bias), layer(x))
    assert not torch.equal(layer.weight, W)
    with isotune.disabled(model):
        assert layer.weight is W
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = layer.no_such_thing


@named
def test_output_projection_of_multihead_attention_is_reached_through_its_weight(method: Settings) -> None:
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    model, x = nn.Sequential(attention), torch.randn(2, 5, 16)
    before = attention(x, x, x)[0]
    isotune.adapt(model, method, ["0.out_proj"], seed=0)
    torch.testing.assert_close(attention(x, x, x)[0], before)
    move(model)
    y = attention(x, x, x)[0]
    assert not torch.allclose(y, before, atol=1e-3)
    y.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    isotune.fold(model)
    torch.testing.assert_close(attention(x, x, x)[0], y)
    with torch.no_grad():
        attention.eval()
        torch.testing.assert_close(attention(x, x, x)[0], y)


@named
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_t5_that_asks_for_a_layers_dtype_works(method: Settings, dtype: torch.dtype) -> None:
    config = transformers.T5Config(  # its feed-forward layer asks for wo.weight.dtype
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_heads=2,
        vocab_size=50,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
    model = transformers.T5ForConditionalGeneration(config).to(dtype)
    adapted(model, method, "all-linear")
    ids = torch.arange(5, 15)[None]
    loss = model(input_ids=ids, labels=ids).loss
    assert loss.isfinite()
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() and g.dtype == torch.float32 for g in grads)


@named
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_base_in_any_precision_trains_an_fp32_adapter(method: Settings, dtype: torch.dtype) -> None:
    model = stories().to(dtype)
    isotune.adapt(model, method, "all-linear", seed=0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in parameters} == {torch.float32}
    inputs = tokens(model)
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert model(**inputs).logits.dtype == dtype
    assert losses[-1] < losses[0] - 0.1


def vit() -> nn.Module:
    """Its main input is no token ids: transformers does not make the frozen embeddings ask for gradients."""
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            image_size=32,
            patch_size=16,
        )
    )


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    inputs = {"pixel_values": torch.ones(2, 3, 32, 32)} if model.config.model_type == "vit" else tokens(model)
    torch.manual_seed(0)
    result = model(**inputs)
    result[0].square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@named
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("make", [stories, minilm, vit], ids=["llama", "bert", "vit"])
@pytest.mark.parametrize("first", ["adapt first", "checkpointing first"])
def test_gradient_checkpointing_with_a_frozen_base_gives_the_same_gradients(
    method: Settings, use_reentrant: bool, make, first: str
) -> None:
    expected = gradients(adapted(make(), method, "all-linear").train())
    model = make()
    arguments = {"use_reentrant": use_reentrant}
    if make is vit and use_reentrant:
        # transformers does this by itself for models of token ids; torch warns where it was forgotten.
        model.enable_input_require_grads()
    if first == "checkpointing first":
        model.activation_checkpointing_enable(arguments)
    adapted(model, method, "all-linear").train()
    if first == "adapt first":
        model.activation_checkpointing_enable(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = gradients(model)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_same_output(got[name], gradient, 1e-4)


def test_reentrant_checkpointing_of_pixels_without_input_gradients_is_warned_about() -> None:
    model = adapted(vit(), HRA(rank=4), "all-linear").train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"):
        model(pixel_values=torch.ones(2, 3, 32, 32))
