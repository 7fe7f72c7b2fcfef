"""AdaptFormer where its authors' code has it: what it reads is the residual stream, before the norm of the MLP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import isotune
from isotune.errors import IsotuneError, OptionError
from support import assert_same_output, move, output, stories, tokens

NORM = "post_attention_layernorm"


def before(norm: str = NORM, **options: Any) -> Any:
    return isotune.method("adaptformer", **{"rank": 4, "before": norm, **options})


def by_hand(adapter: Any, v: Tensor) -> Tensor:
    """The change for v (..., d)."""
    return 0.1 * (torch.relu(v @ adapter.D.mT + adapter.d) @ adapter.U.mT + adapter.u)


@torch.no_grad()
def test_in_a_llama_it_reads_what_the_attention_left_and_adds_to_what_the_mlp_gives() -> None:
    model = stories()
    expected = model(**tokens(model)).logits
    isotune.adapt(model, before(), "blocks", seed=0)
    assert torch.equal(model(**tokens(model)).logits, expected)
    move(model, size=0.5)
    ids = tokens(model)["input_ids"]
    base, h = stories().model, model.model.embed_tokens(ids)
    rotary = base.rotary_emb(h, torch.arange(ids.shape[1])[None])
    for plain, adapted in zip(base.layers, model.model.layers, strict=True):
        mask = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)[None, None]
        h = h + plain.self_attn(plain.input_layernorm(h), position_embeddings=rotary, attention_mask=mask)[0]
        h = h + plain.mlp(plain.post_attention_layernorm(h)) + by_hand(adapted.isotune["default"], h)
    assert_same_output(model.model(ids).last_hidden_state, base.norm(h), 1e-4)
    with isotune.disabled(model):
        assert torch.equal(model(**tokens(model)).logits, expected)


@torch.no_grad()
def test_a_larger_stream_gives_a_larger_change_where_an_mlp_sees_the_same() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mlp = nn.RMSNorm(8, eps=0.0), nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))

        def forward(self, h: Tensor) -> Tensor:
            y: Tensor = h + self.mlp(self.norm(h))
            return y

    torch.manual_seed(0)
    h = torch.randn(5, 8)
    changes = {}
    for settings, targets in ((before("norm"), "blocks"), (before("norm", before=None), ["mlp"])):
        model = nn.Sequential(nn.ModuleDict({"layers": nn.ModuleList([Layer()])})).eval()
        layer: Any = model[0]["layers"][0]  # type: ignore[index]
        isotune.adapt(model, settings, targets, seed=0)
        move(model, size=0.5)
        for parameter in (p for name, p in model.named_parameters() if name.endswith((".d", ".u"))):
            parameter.zero_()
        with isotune.disabled(model):
            plain = layer(h), layer(4 * h)
        changes[settings.before] = [y - y0 for y, y0 in zip((layer(h), layer(4 * h)), plain, strict=True)]
    assert changes["norm"][0].abs().max() > 1e-3
    assert_same_output(changes["norm"][1], 4 * changes["norm"][0], 1e-4)
    assert_same_output(changes[None][1], changes[None][0], 1e-4)


def test_both_factors_learn_also_where_activations_are_made_again_in_the_backward_pass() -> None:
    model = isotune.adapt(stories(), before(dropout=0.0), "blocks", seed=0).train()
    twin = isotune.adapt(stories(), before(dropout=0.0), "blocks", seed=0).train()
    twin.activation_checkpointing_enable()
    for own in (model, twin):
        move(own)
        ids = tokens(own)["input_ids"]
        own(ids, labels=ids, use_cache=False).loss.backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad is not None) == ("isotune" in name)
        if p.grad is not None:
            assert p.grad.any()
            torch.testing.assert_close(q.grad, p.grad)


def test_it_is_saved_with_the_name_of_the_norm(tmp_path: Path) -> None:
    model = move(isotune.adapt(stories(), before(), "blocks", seed=0))
    isotune.save(model, tmp_path)
    assert torch.equal(output(isotune.load(stories(), tmp_path)), output(model))


def test_a_vision_transformer_calls_its_norm_otherwise() -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=16, patch_size=4
    )
    model = transformers.ViTModel(config).eval()
    with pytest.raises(
        OptionError, match="is no module in a ViTLayer, whose norms are: layernorm_before, layernorm_a"
    ):
        isotune.adapt(model, before(), "blocks")
    pixels = torch.randn(2, 3, 16, 16)
    y = model(pixels).last_hidden_state
    isotune.adapt(model, before("layernorm_after"), "blocks", seed=0)
    assert torch.equal(model(pixels).last_hidden_state, y)
    assert not torch.allclose(move(model)(pixels).last_hidden_state, y, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "targets", "message"),
    [
        (before(), "mlp", r"is no module in a LlamaMLP, whose norms are: none; .* targets='blocks'"),
        (before(place="sequential"), "blocks", "says what D reads, and so does place='sequential'"),
    ],
)
def test_what_cannot_be_is_refused(settings: Any, targets: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        isotune.adapt(stories(), settings, targets)


def test_a_norm_that_is_not_called_once_is_refused_and_no_hook_stays() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.idle, self.linear = nn.LayerNorm(4), nn.LayerNorm(4), nn.Linear(4, 4)

        def forward(self, h: Tensor) -> Tensor:
            y: Tensor = h + self.linear(self.norm(self.norm(h)))
            return y

    for norm, times in (("norm", 2), ("idle", 0)):
        layers = nn.ModuleList([Layer()])
        isotune.adapt(layers, before(norm), ["0"], seed=0)
        with pytest.raises(IsotuneError, match=f"called this norm {times} times"):
            layers[0](torch.randn(2, 4))
        assert not any(module._forward_pre_hooks for module in layers.modules())
