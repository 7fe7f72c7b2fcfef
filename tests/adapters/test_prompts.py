"""Prefix tuning, prompt tuning and deep prompts: what they compute, PEFT's own, and whom they refuse."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import isotune
from both_ways import by_peft, tiny_gpt2
from isotune.adapters.prompt.deep import DeepPrompts
from isotune.adapters.prompt.prefix import PrefixTuning
from isotune.adapters.prompt.shallow import PromptTuning
from isotune.checkpoint.export_peft import export_peft
from isotune.errors import CheckpointError, IsotuneError, OptionError, TargetError
from isotune.sites import require_site
from support import MINILM, adapted, assert_same_output, minilm, output, stories, tokens

CONFIGS = {"prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig}


def classifier() -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForSequenceClassification.from_pretrained(MINILM).eval()


def only(model: nn.Module) -> tuple[Any, Any]:
    """The one adapted layer and its adapter."""
    (layer,) = (module for module in model.modules() if hasattr(module, "isotune"))
    return layer, layer.isotune["default"]


def test_a_prefix_is_attention_over_more_keys_and_values() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True).double()
    model = isotune.adapt(nn.Sequential(attention), PrefixTuning(tokens=3, spread=1.0), ["0"], seed=0).eval()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    adapter = only(model)[1]
    q, k, v = (x @ attention.in_proj_weight.T + attention.in_proj_bias).chunk(3, dim=-1)
    k, v = (torch.cat([own.expand(2, -1, -1), t], dim=1) for own, t in ((adapter.K, k), (adapter.V, v)))
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        shares = (q[..., part] @ k[..., part].mT / math.sqrt(4)).softmax(-1)
        heads.append(shares @ v[..., part])
    expected = attention.out_proj(torch.cat(heads, dim=-1))
    assert_same_output(model[0](x, x, x, need_weights=False)[0], expected, 1e-12)


def test_few_heads_of_keys_serve_many_of_queries_and_causal_queries_see_the_whole_prefix() -> None:
    model = isotune.adapt(stories(), PrefixTuning(tokens=3), seed=0)
    assert {tuple(m.isotune["default"].K.shape) for m in model.modules() if hasattr(m, "isotune")} == {(3, 32)}
    ids = tokens(model)["input_ids"]
    whole, first = output(model, input_ids=ids), output(model, input_ids=ids[:, :1])
    assert_same_output(first[:, 0], whole[:, 0])
    assert not torch.allclose(first, output(stories(), input_ids=ids[:, :1]), atol=1e-3)


def test_packed_matrices_tell_how_wide_keys_are() -> None:
    torch.manual_seed(0)
    config = transformers.Phi3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, original_max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    few = isotune.adapt(transformers.Phi3ForCausalLM(config).eval(), PrefixTuning(tokens=3), seed=0)
    assert {tuple(m.isotune["default"].V.shape) for m in few.modules() if hasattr(m, "isotune")} == {(3, 16)}
    assert output(few).isfinite().all()
    gpt2 = isotune.adapt(tiny_gpt2(), PrefixTuning(tokens=3), seed=0)
    assert {tuple(m.isotune["default"].V.shape) for m in gpt2.modules() if hasattr(m, "isotune")} == {(3, 16)}
    assert not torch.allclose(output(gpt2), output(tiny_gpt2()), atol=1e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_pefts_folders_are_read_and_written(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name](task_type="CAUSAL_LM", num_virtual_tokens=3)
    theirs = by_peft(stories(), config, tmp_path / "theirs")
    ours = isotune.load(stories(), tmp_path / "theirs")
    new = 3 if name == "prompt" else 0  # PEFT gives outputs for the prompts as well
    assert_same_output(output(ours), output(theirs)[:, new:])
    ids = tokens(ours)["input_ids"][:1, :5]
    asked: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(ours.generate(ids, **asked), generated(theirs, ids, asked))
    isotune.save(ours, tmp_path / "ours")
    export_peft(tmp_path / "ours", tmp_path / "again")
    assert_same_output(output(peft.PeftModel.from_pretrained(stories(), tmp_path / "again").eval()), output(theirs))


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
def generated(model: Any, ids: Tensor, asked: dict[str, Any]) -> Tensor:
    with pytest.warns() if model.peft_type == "PROMPT_TUNING" else torch.no_grad():
        return model.generate(input_ids=ids, **asked)


def test_modules_trained_in_full_go_along(tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    theirs = by_peft(classifier(), config, tmp_path / "theirs")
    ours = isotune.load(classifier(), tmp_path / "theirs")
    head = theirs.base_model.classifier.modules_to_save["default"]
    assert torch.equal(ours.classifier.isotune["default"].weight, head.weight)
    isotune.save(ours, tmp_path / "ours")
    export_peft(tmp_path / "ours", tmp_path / "again")
    again = isotune.load(classifier(), tmp_path / "again")
    assert torch.equal(output(again), output(ours))


def test_the_pooled_token_is_the_texts_where_peft_pools_a_prompt(tmp_path: Path) -> None:
    theirs = by_peft(classifier(), peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3), tmp_path)
    model = isotune.load(classifier(), tmp_path)
    inputs = tokens(model)
    hidden, pooled = model.bert(**inputs)[:2]
    assert torch.equal(pooled, model.bert.pooler(hidden))
    text = model.bert.embeddings.word_embeddings(inputs["input_ids"])
    prompts = torch.cat([only_prompt(theirs).expand(2, -1, -1), text], 1)
    mask = torch.cat([torch.ones(2, 3), inputs["attention_mask"]], 1)
    bare = classifier().bert(inputs_embeds=prompts, attention_mask=mask)
    assert_same_output(hidden, bare[0][:, 3:])
    head = theirs.base_model.classifier
    assert_same_output(output(theirs), head(bare[1]))  # the pooled output at place 0, a prompt
    assert not torch.allclose(output(theirs), output(model), atol=1e-3)


def only_prompt(model: Any) -> Tensor:
    return model.prompt_encoder["default"].embedding.weight.detach()


@pytest.mark.parametrize("method", [PrefixTuning(tokens=3), PromptTuning(tokens=3), DeepPrompts(tokens=3)])
def test_generation_keeps_a_cache_and_takes_padding_on_the_left(method: isotune.Settings) -> None:
    model = adapted(stories(), method, None)
    ids = tokens(model)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    asked: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    both = model.generate(ids, attention_mask=mask, **asked)
    alone = model.generate(ids[1:, 4:], attention_mask=mask[1:, 4:], **asked)
    assert torch.equal(both[1:, 12:], alone[:, 8:])
    assert torch.equal(model.generate(ids, attention_mask=mask, use_cache=False, **asked), both)


def test_hidden_states_keep_the_length_of_the_text() -> None:
    model = isotune.adapt(stories(), PromptTuning(tokens=3), seed=0)
    found = model(**tokens(model), output_hidden_states=True)
    assert {hidden.shape[1] for hidden in found.hidden_states} == {12}
    assert torch.equal(found.hidden_states[-1], model.model(**tokens(model))[0])


@pytest.mark.parametrize("start", ["vocabulary", "random"])
def test_prompts_start_as_tokens_or_at_random(start: Any) -> None:
    model = isotune.adapt(stories(), PromptTuning(tokens=5, start=start), seed=0)
    P, table = only(model)[1].P, model.model.embed_tokens.weight
    known = [bool((row == table).all(1).any()) for row in P]
    assert known == [start == "vocabulary"] * 5


def test_a_deep_prompt_is_the_layer_on_prompts_and_text() -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=32,
                                    image_size=16, patch_size=8)  # fmt: skip
    model = isotune.adapt(transformers.ViTModel(config).eval(), DeepPrompts(tokens=4), ["layers.1"], seed=0)
    layer, adapter = only(model)
    x = torch.randn(2, 5, 24)
    with torch.no_grad():
        assert_same_output(layer(x), adapter.reference(x, require_site(layer, "")))
    assert model(torch.randn(2, 3, 16, 16))[0].shape == (2, 5, 24)


def test_models_that_compute_attention_by_hand_are_asked_for_the_other() -> None:
    model = isotune.adapt(minilm(), PrefixTuning(tokens=2), ["layer.0"], seed=0)  # opened as "eager"
    assert model.config._attn_implementation == "eager"
    other = transformers.AutoModel.from_pretrained(MINILM, attn_implementation="sdpa").eval()
    other = isotune.adapt(other, PrefixTuning(tokens=2), ["layer.0"], seed=0)
    assert_same_output(output(model), output(other))
    assert model.config._attn_implementation == "eager"


class ByHand(nn.Module):
    """Attention that calls nothing that could be met."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """y (b, n, 4) of x (b, n, 4)."""
        return (self.q(x) @ self.k(x).mT).softmax(-1) @ self.v(x)


def test_what_does_not_fit_is_said() -> None:
    model = isotune.adapt(nn.Sequential(ByHand()), PrefixTuning(tokens=2), ["0"])
    with pytest.raises(IsotuneError, match="scaled_dot_product_attention never: open the model with attn"):
        model(torch.randn(1, 3, 4))
    with pytest.raises(OptionError, match="LlamaMLP holds no layers that are, by their names, those of keys"):
        isotune.adapt(stories(), PrefixTuning(), "mlp")
    with pytest.raises(OptionError, match="LlamaMLP does not turn token ids"):
        isotune.adapt(stories(), PromptTuning(), "mlp")
    with pytest.raises(TargetError, match="open it with a head on it"):
        isotune.adapt(minilm(), PromptTuning())
    model = isotune.adapt(stories(), PromptTuning(), seed=0)
    with pytest.raises(IsotuneError, match=r"mask of shape \(batch, tokens\)"):
        model(torch.ones(1, 3, dtype=torch.long), attention_mask=torch.zeros(1, 1, 3, 3))


def test_peft_folders_that_cannot_be_are_refused(tmp_path: Path) -> None:
    by_peft(stories(), CONFIGS["prefix"](task_type="CAUSAL_LM", num_virtual_tokens=3), tmp_path / "theirs")
    with pytest.raises(CheckpointError, match="does not say for which layers; load it on its model"):
        export_peft(tmp_path / "theirs", tmp_path / "out")
    with pytest.raises(CheckpointError, match="has no rotary embeddings"):
        isotune.load(classifier(), tmp_path / "theirs")
    isotune.save(isotune.adapt(minilm(), PrefixTuning(tokens=2), seed=0), tmp_path / "ours")
    with pytest.raises(CheckpointError, match="no rotary embeddings: PEFT moves the text"):
        export_peft(tmp_path / "ours", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"to the block 'encoder\.layer\.0\.attention' is none of a weight"):
        isotune.export_lora(tmp_path / "ours", tmp_path / "out", base=MINILM)
    assert not (tmp_path / "out").exists()
