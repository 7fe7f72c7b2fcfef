"""Adapters in the layer, where models are shared, tied, empty, compiled, wrapped, or read by their own modules."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import isotune
from isotune import HRA, IsotuneError, LoRA, Settings
from isotune.bare import HOME
from isotune.errors import NoLowRankFormError, TargetError
from support import adapted, assert_same_output, minilm, move, output, stories, tokens

METHODS = [HRA(rank=4), LoRA(rank=4)]
named = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


@named
def test_a_folded_model_is_saved_as_a_plain_one_and_an_adapted_one_as_its_base(
    method: Settings, tmp_path: Path
) -> None:
    base, model = minilm(), adapted(minilm(), method, "all-linear", train_also=["pooler"])
    before = model(**tokens(model)).pooler_output
    for name, expected in (("adapted", base(**tokens(base)).pooler_output), ("folded", before)):
        if name == "folded":
            isotune.fold(model)
        model.save_pretrained(tmp_path / name)
        again, info = transformers.AutoModel.from_pretrained(
            tmp_path / name, attn_implementation="eager", output_loading_info=True
        )
        assert not info["missing_keys"]
        assert all(HOME in key for key in info["unexpected_keys"])
        assert_same_output(again.eval()(**tokens(again)).pooler_output, expected)
    assert_same_output(isotune.unfold(model)(**tokens(model)).pooler_output, before)
    isotune.remove(model)
    assert all(torch.equal(t, base.state_dict()[name]) for name, t in model.state_dict().items())


@named
@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]], ids=str)
def test_tying_again_keeps_the_ties_of_an_adapted_model(method: Settings, targets: list[str]) -> None:
    model = adapted(stories(), method, targets)
    before = output(model)
    model.tie_weights()
    assert model.lm_head._parameters["weight"] is model.model.embed_tokens._parameters["weight"]
    assert torch.equal(output(model), before)
    isotune.remove(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@named
def test_a_head_trained_in_full_leaves_the_embedding_it_is_tied_to_alone(method: Settings) -> None:
    model = adapted(stories(), method, train_also=["lm_head"])
    before, bits = output(model), stories().model.embed_tokens.weight
    model.tie_weights()
    assert torch.equal(output(model), before)
    isotune.fold(model)
    assert torch.equal(model.model.embed_tokens.weight, bits)
    assert_same_output(output(model), before)
    assert not torch.equal(model.lm_head.weight, bits)
    isotune.remove(isotune.unfold(model))
    assert model.lm_head.weight is model.model.embed_tokens.weight


@named
def test_an_empty_model_is_adapted_whatever_the_default_device(method: Settings) -> None:
    config = stories().config
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(config)
        isotune.adapt(empty, method, "all-linear", train_also=["norm"])
    assert {t.device.type for t in empty.state_dict().values()} == {"meta"}
    model = isotune.adapt(stories(), method, "all-linear", seed=3)
    with torch.device("meta"):
        other = isotune.adapt(stories(), method, "all-linear", seed=3)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert one.device == two.device
        assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_modules_trained_in_full_on_a_half_precision_base_are_fp32_and_answer_in_its_dtype(
    dtype: torch.dtype,
) -> None:
    model = isotune.adapt(
        minilm().to(dtype), LoRA(rank=2), ["query"], train_also=["pooler", "word_embeddings"], seed=0
    )
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    found = model(**tokens(model))
    assert {found.last_hidden_state.dtype, found.pooler_output.dtype} == {dtype}
    found.pooler_output.float().square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.autocast("cpu", dtype):
        assert model(**tokens(model)).pooler_output.dtype == dtype
    isotune.fold(model)
    assert model.pooler.dense.weight.dtype == dtype


def test_a_module_trained_in_full_answers_with_its_copy_and_runs_its_hooks_once() -> None:
    model = minilm()
    calls: list[int] = []
    model.pooler.register_forward_hook(lambda *_: calls.append(1))
    kind, dense = type(model.pooler), model.pooler.dense
    isotune.adapt(model, HRA(rank=2), ["query"], train_also=["pooler"], seed=0)
    assert isinstance(model.pooler, kind)
    assert model.pooler.dense is model.pooler.isotune["default"].dense
    with isotune.disabled(model):
        assert model.pooler.dense is dense
    model(**tokens(model))
    assert calls == [1]
    y = move(model)(**tokens(model)).pooler_output
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(_without_hooks(model)))):
        assert torch.equal(twin(**tokens(twin)).pooler_output, y)
    torch._dynamo.reset()
    compiled = torch.compile(model.pooler, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, 384)
    assert_same_output(compiled(x), model.pooler(x))


def test_a_sequence_of_modules_is_trained_in_full_and_adapted_as_a_block() -> None:
    torch.manual_seed(0)
    shared = nn.Tanh()  # twice in the sequence, and to be run twice
    model = nn.ModuleDict(
        {"layer": nn.Linear(6, 6), "head": nn.Sequential(nn.Linear(6, 6), shared, nn.Linear(6, 4), shared)}
    )
    x = torch.randn(3, 6)
    y = model["head"](x)
    isotune.adapt(model, HRA(rank=2), ["layer"], train_also=["head"], seed=0)
    with isotune.disabled(model):
        assert torch.equal(model["head"](x), y)
        assert torch.equal(model["head"](input=x), y)
    move(model)
    assert not torch.equal(model["head"](x), y)
    isotune.remove(model)
    assert torch.equal(model["head"](x), y)
    isotune.adapt(model, isotune.method("houlsby", rank=2), ["head"], seed=0)
    assert torch.equal(model["head"](x), y)


def _without_hooks(model: Any) -> Any:
    model.pooler._forward_hooks.clear()
    return model


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)).eval()


@named
@torch.no_grad()
def test_a_layer_that_its_module_reads_and_never_calls_has_the_adapter_in_its_weight(
    method: Settings, tmp_path: Path
) -> None:
    x = torch.randn(2, 5, 16)
    model, base = adapted(encoder(), method, ["out_proj", "linear1", "linear2"], size=0.2), encoder()(x)
    slow = model.train()(x)
    # In evaluation torch's fast path reads the weights of all of them.
    assert_same_output(model.eval()(x), slow)
    assert not torch.allclose(slow, base, atol=1e-3)
    with pytest.raises(NoLowRankFormError, match=r"out_proj.*never called"):
        isotune.export_lora(model, tmp_path / "lora")
    isotune.save(model, tmp_path / "adapter")
    assert "never called" in (tmp_path / "adapter" / "README.md").read_text()
    assert_same_output(isotune.load(encoder(), tmp_path / "adapter")(x), slow)
    assert_same_output(isotune.fold(model)(x), slow)


def test_what_a_layer_cannot_do_that_is_never_called_is_refused() -> None:
    with pytest.raises(TargetError, match=r"out_proj.*MultiheadAttention: its dropout.*set dropout=0"):
        isotune.adapt(encoder(), LoRA(rank=2, dropout=0.5), ["out_proj"])
    model = isotune.adapt(encoder(), LoRA(rank=2), ["out_proj"])
    with pytest.raises(IsotuneError, match="a parameter, which the rows of a batch must share"):
        isotune.use(model, rows=["default", None])


@torch.no_grad()
def test_pefts_lora_on_a_whole_attention_loads_though_peft_adds_one_change_twice(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["self_attn"], init_lora_weights=False)
    get_peft_model(encoder(), config).save_pretrained(tmp_path)
    ours, x = isotune.load(encoder(), tmp_path), torch.randn(2, 5, 16)
    assert {row.site for row in isotune.describe(ours)} == {"0.self_attn.in_proj_weight", "0.self_attn.out_proj"}
    attention: Any = ours[0].self_attn

    def plain(times: int) -> Tensor:
        twin: Any = encoder().train()
        own = twin[0].self_attn
        own.in_proj_weight.data = attention.in_proj_weight
        own.out_proj.weight += times * (attention.out_proj.weight - own.out_proj.weight)
        return twin(x)

    assert_same_output(ours.train()(x), plain(1))
    # In evaluation torch's fast path goes around PEFT's layers; in training they add out_proj's change twice.
    assert_same_output(PeftModel.from_pretrained(encoder(), tmp_path).train()(x), plain(2))


def test_a_forward_put_on_the_layer_itself_still_runs_and_comes_back() -> None:
    layer = nn.Linear(6, 4)
    own, seen = layer.forward, []

    def watched(x: Tensor) -> Tensor:
        seen.append(x.shape)
        return own(x)

    layer.forward = watched  # type: ignore[method-assign]
    model, x = adapted(nn.Sequential(layer), LoRA(rank=2), ["0"], size=0.3), torch.randn(3, 6)
    W, b = layer._parameters["weight"], layer._parameters["bias"]
    B, A = model[0].isotune["default"].change()
    assert_same_output(model(x), nn.functional.linear(x, W, b) + x @ A.mT @ B.mT)
    assert seen == [x.shape]
    isotune.remove(model)
    assert layer.forward is watched
    assert_same_output(model(x), nn.functional.linear(x, W, b))


def test_a_class_extended_over_the_adapters_is_not_taken_away() -> None:
    model = isotune.adapt(nn.Sequential(nn.Linear(6, 4)), LoRA(rank=2), ["0"])
    model[0].__class__ = type("Mine", (type(model[0]),), {})
    with pytest.raises(IsotuneError, match="was extended after its adapters came"):
        isotune.remove(model)


@named
@torch.no_grad()
def test_a_layer_with_a_weight_that_others_parametrized_is_adapted(method: Settings) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5))), torch.randn(3, 6)
    before = model(x)
    adapted(model, method, lambda path, module: path == "0")
    with isotune.disabled(model):
        assert torch.equal(model(x), before)
    assert_same_output(model(x), nn.functional.linear(x, model[0].weight, model[0].bias))
    with pytest.raises(IsotuneError, match="'0' cannot be folded: its weight is no parameter"):
        isotune.fold(model)
    isotune.remove(model)
    assert torch.equal(model(x), before)
