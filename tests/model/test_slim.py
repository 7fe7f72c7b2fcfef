"""Models made smaller by channels left out: the same outputs and plain layers, or an error and no change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import isotune
from isotune.adapters.sparse.splora import SPLoRA
from isotune.errors import IsotuneError
from support import assert_same_output, assert_unchanged, move, resnet20, snapshot

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
IDS = {"input_ids": torch.arange(3, 15).view(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.int64)}
CONVOLUTIONS = r"layer\d\.\d\.conv\d"


def bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(vocab_size=20, **SMALL))


def llama() -> nn.Module:
    return transformers.LlamaModel(transformers.LlamaConfig(vocab_size=20, num_key_value_heads=2, **SMALL))


def vit() -> nn.Module:
    return transformers.ViTModel(transformers.ViTConfig(image_size=8, patch_size=4, **SMALL))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=20, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2Model(config)


MODELS: dict[str, tuple[Callable[[], nn.Module], Any, Any, dict[str, Any]]] = {
    "bert": (bert, "all-linear", IDS, {"head_size": 8}),
    "llama": (llama, "all-linear", IDS, {"head_size": 8}),
    "vit": (vit, "all-linear", {"pixel_values": torch.ones(2, 3, 8, 8)}, {"head_size": 8}),
    "gpt2": (gpt2, "mlp", IDS, {}),
    "resnet": (resnet20, CONVOLUTIONS, torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32), {}),
}


def pruned(model: nn.Module, targets: Any, method: str = "splora", **options: Any) -> nn.Module:
    options = {"keep": 0.5, **({"rank": 4} if method == "splora" else {}), **options}
    move(isotune.adapt(model, isotune.method(method, **options), targets, seed=0), size=0.02)
    isotune.after_step(model)
    return model.eval()


@torch.no_grad()
def run(model: nn.Module, inputs: Any) -> Tensor:
    y = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return y if isinstance(y, Tensor) else y[0]


@pytest.mark.parametrize("method", ["splora", "sppara"])
@pytest.mark.parametrize("name", MODELS)
def test_a_slim_model_computes_what_the_masked_one_did(name: str, method: str) -> None:
    make, targets, inputs, options = MODELS[name]
    torch.manual_seed(0)
    model = make()
    full = sum(p.numel() for p in model.parameters())
    pruned(model, targets, method, **options)
    expected = run(model, inputs)
    made = isotune.slim(model)
    assert made.model is model
    assert_same_output(run(model, inputs), expected)
    assert made.before == full
    assert made.after == sum(p.numel() for p in model.parameters()) < full
    assert all(left == total // 2 for left, total in made.channels.values())
    assert not any("isotune" in path for path, _ in model.named_modules())


def test_the_layers_of_a_slim_resnet_and_llama_say_their_sizes() -> None:
    model: Any = pruned(resnet20(), CONVOLUTIONS, keep=0.25)
    made = isotune.slim(model)
    block = model.layer3[1]
    assert (block.conv1.in_channels, block.conv1.out_channels) == (64, 16)
    assert (block.conv2.in_channels, block.conv2.out_channels) == (16, 64)
    assert block.bn1.num_features == 16
    assert block.bn2.num_features == 64
    inner = 9 * (16 * 16 * 6 + 16 * 32 + 32 * 32 * 5 + 32 * 64 + 64 * 64 * 5) * 3 // 4
    norms = 2 * 3 * (16 + 32 + 64) * 3 // 4
    assert made.before - made.after == inner + norms
    torch.manual_seed(0)
    model = pruned(bert(), "all-linear", head_size=8)
    isotune.slim(model)
    attention = model.encoder.layer[0].attention.self
    assert (attention.num_attention_heads, attention.all_head_size) == (2, 16)
    assert (attention.query.in_features, attention.query.out_features) == (32, 16)


def test_a_slim_model_trains_on() -> None:
    torch.manual_seed(0)
    model: Any = pruned(nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5)), ["0", "2"])
    isotune.slim(model)
    assert model[0].weight.shape == (3, 8)
    isotune.adapt(model, SPLoRA(rank=2), ["0", "2"], seed=0)
    model(torch.randn(2, 8)).square().sum().backward()
    assert model[0].isotune["default"].B.grad is not None


def test_a_batch_norm_that_is_trained_beside_the_adapter_is_made_smaller_too() -> None:
    model: Any = resnet20()
    isotune.adapt(model, SPLoRA(rank=4), CONVOLUTIONS, train_also=["layer1.0.bn1", "layer1.0.bn2"], seed=0)
    isotune.after_step(move(model, size=0.02))
    x = MODELS["resnet"][2]
    expected = run(model.eval(), x)
    isotune.slim(model)
    assert_same_output(run(model, x), expected)
    assert model.layer1[0].bn1.weight.shape == model.layer1[0].bn1.running_var.shape == (8,)
    assert type(model.layer1[0].bn1) is nn.BatchNorm2d


class Normed(nn.Module):
    """Two layers with a norm over their channels between them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.up(x)))


def test_what_cannot_be_made_smaller_is_refused_and_stays_as_it_was() -> None:
    torch.manual_seed(0)
    t5 = transformers.T5EncoderModel(
        transformers.T5Config(num_layers=1, d_model=16, d_ff=24, d_kv=8, num_heads=2, vocab_size=20)
    )
    twice = pruned(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5)), ["0", "1"])
    isotune.adapt(twice, isotune.LoRA(rank=1), ["0"], name="more")
    cases = (
        (pruned(nn.Sequential(nn.Linear(8, 6)), "0"), "nothing to make smaller"),
        (pruned(Normed(), ["up", "down"]), "'norm', a LayerNorm, stands between"),
        (
            pruned(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 5)), ["0", "2"]),
            "'1', a Linear, stands",
        ),
        (pruned(t5, "all-linear", head_size=8), "does not say how large its heads are"),
        (isotune.use(twice, "default", "more"), "2 adapters are active"),
        (isotune.fold(pruned(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5)), ["0", "1"])), "unfold"),
    )
    for model, reason in cases:
        before = snapshot(model)
        with pytest.raises(IsotuneError, match=reason):
            isotune.slim(model)
        assert_unchanged(model, before)
    grouped = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(6, 4, 3))
    isotune.adapt(grouped, SPLoRA(rank=1), ["0", "1"], overrides={"0": {"outputs": "c"}, "1": {"inputs": "c"}})
    with pytest.raises(IsotuneError, match="'0' is a grouped convolution"):
        isotune.slim(grouped)


def test_outputs_that_nothing_reads_are_zero_and_stay() -> None:
    model: Any = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5))
    isotune.adapt(model, SPLoRA(rank=1), ["0", "1"], overrides={"1": {"outputs": "own"}}, seed=0)
    isotune.after_step(model)
    made = isotune.slim(model)
    assert made.channels == {"0": (3, 6), "own": (2, 5)}
    assert model[1].weight.shape == (5, 3)
    assert int(model[1].weight.any(1).sum()) == 2
