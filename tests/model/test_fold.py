"""Folding adapters into real models and taking them out again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import isotune
from isotune import HRA, IsotuneError, LoRA, Settings
from support import STORIES, adapted, assert_same_output, minilm, output, resnet20, snapshot, stories, tokens

METHODS = [HRA(rank=4), LoRA(rank=4)]
named = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


@named
def test_llama_writes_the_same_story_before_and_after_folding(method: Settings) -> None:
    model = adapted(stories(), method, "all-linear")
    tokenizer = transformers.AutoTokenizer.from_pretrained(STORIES)
    prompt = tokenizer("Once upon a time", return_tensors="pt")

    def story() -> list[int]:
        return model.generate(**prompt, max_new_tokens=40, do_sample=False)[0].tolist()

    before, logits = story(), output(model)
    with isotune.disabled(model):
        assert story() != before
    isotune.fold(model)
    assert story() == before
    assert_same_output(output(model), logits)
    isotune.unfold(model)
    assert story() == before
    assert torch.equal(output(model), logits)


def test_folding_without_keeping_the_base_gives_a_plain_model_to_save(tmp_path: Path) -> None:
    model = adapted(minilm(), HRA(rank=4), "all-linear", train_also=["pooler"])
    plain_names = [name for name, _ in minilm().named_parameters()]
    before = output(model)
    isotune.fold(model, keep_base=False)
    assert [name for name, _ in model.named_parameters()] == plain_names
    assert all(type(module).__module__.partition(".")[0] != "isotune" for module in model.modules())
    assert_same_output(output(model), before)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert torch.equal(output(again), output(model))


def test_fold_of_a_stack_folds_what_is_active() -> None:
    model = adapted(adapted(stories(), HRA(rank=4), name="one"), LoRA(rank=2), "all-linear", name="two")
    for names in (("one",), ("one", "two"), ("two", "one")):
        before = output(isotune.use(model, *names))
        assert_same_output(output(isotune.fold(model)), before)
        assert torch.equal(output(isotune.unfold(model)), before)


def test_tied_embedding_adapted_and_folded_leaves_the_output_head_alone() -> None:
    model = stories()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    bits = model.lm_head.weight.clone()
    adapted(model, HRA(rank=4), ["embed_tokens"])
    before = output(model)
    isotune.fold(model)
    assert torch.equal(model.lm_head.weight, bits)
    assert_same_output(output(model), before)
    isotune.unfold(model)
    assert torch.equal(output(model), before)
    isotune.remove(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def tied_llama() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("targets", "options"),
    [(["lm_head"], {}), (["q_proj"], {"train_also": ["lm_head"]}), (["q_proj"], {"train_also": ["embed_tokens"]})],
    ids=["adapted head", "trained head", "trained embeddings"],
)
def test_a_head_that_folding_parted_from_its_embeddings_is_saved_as_untied(
    targets: list[str], options: dict[str, list[str]], tmp_path: Path
) -> None:
    model = adapted(tied_llama(), LoRA(rank=2), targets, **options)
    expected = output(model)
    isotune.fold(model)
    assert model.config.tie_word_embeddings is False
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.tie_word_embeddings is False
    assert again.lm_head.weight is not again.model.embed_tokens.weight
    assert_same_output(output(again), expected)
    isotune.unfold(model)
    assert model.config.tie_word_embeddings is True


def test_a_head_that_folding_left_tied_stays_so_in_the_config() -> None:
    model = isotune.fold(adapted(tied_llama(), LoRA(rank=2), ["q_proj"]))
    assert model.config.tie_word_embeddings is True


def test_a_model_that_computes_with_its_tie_keeps_its_config_and_warns() -> None:
    config = transformers.UMT5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    model = transformers.UMT5ForConditionalGeneration(config)
    if model.lm_head.weight is not model.shared.weight:
        pytest.skip("this transformers does not tie the head of UMT5")
    adapted(model, LoRA(rank=2), ["lm_head"])
    with pytest.warns(UserWarning, match="head of this umt5 and its embeddings are no longer one tensor"):
        isotune.fold(model)
    assert model.config.tie_word_embeddings is True


def test_while_folded_every_other_change_is_refused_and_nothing_happens() -> None:
    model = adapted(stories(), HRA(rank=4))
    with pytest.raises(IsotuneError, match="nothing to unfold"):
        isotune.unfold(model)
    isotune.fold(model)
    before = snapshot(model)
    refused = {
        "already folded": lambda: isotune.fold(model),
        "call unfold before switching": lambda: isotune.use(model),
        "call unfold first": lambda: isotune.remove(model),
        "call unfold before adding another": lambda: isotune.adapt(model, LoRA(), name="two"),
        "call unfold before disabling": lambda: isotune.disabled(model).__enter__(),
    }
    for said, call in refused.items():
        with pytest.raises(IsotuneError, match=said):
            call()
    assert snapshot(model)["modules"] == before["modules"]


def test_fold_with_nothing_active_is_refused() -> None:
    with pytest.raises(IsotuneError, match="no adapter is active"):
        isotune.fold(stories())
    with pytest.raises(IsotuneError, match="no adapter is active"):
        isotune.fold(isotune.use(adapted(stories(), HRA(rank=4))))


@named
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base_folds_within_its_rounding_and_unfolds_to_the_bit(
    method: Settings, dtype: torch.dtype
) -> None:
    model = stories().to(dtype)
    bits = {name: p.clone() for name, p in model.named_parameters()}
    adapted(model, method, "all-linear")
    before = output(model)
    for _ in range(3):
        isotune.fold(model)
        assert output(model).dtype == dtype
        assert_same_output(output(model), before, 0.05)
        isotune.unfold(model)
    isotune.remove(model)
    assert all(torch.equal(p, bits[name]) for name, p in model.named_parameters())


@named
def test_resnet_with_adapted_convolutions_folds_saves_and_loads(method: Settings, tmp_path: Path) -> None:
    model, images = resnet20(), torch.randn(4, 3, 32, 32)
    base = output(model, x=images)
    adapted(model, method, lambda path, module: isinstance(module, nn.Conv2d), size=0.02)
    assert len(isotune.describe(model)) == 19
    before = output(model, x=images)
    assert not torch.allclose(before, base, atol=1e-2)
    isotune.save(model, tmp_path / "adapter")
    loaded = isotune.load(resnet20(), tmp_path / "adapter").eval()
    assert torch.equal(output(loaded, x=images), before)
    assert_same_output(output(isotune.fold(model), x=images), before)
    assert torch.equal(output(isotune.unfold(model), x=images), before)
    assert torch.equal(output(isotune.remove(model), x=images), base)


def test_trained_inputs_reach_the_loss_through_a_folded_model() -> None:
    model = isotune.fold(adapted(stories(), HRA(rank=4)))
    embeds = model.get_input_embeddings()(tokens(model)["input_ids"]).detach().requires_grad_()
    model(inputs_embeds=embeds).logits.sum().backward()
    assert embeds.grad is not None
    assert not any(p.requires_grad for n, p in model.named_parameters() if "isotune" not in n)
