"""A language model's loss from chunks of rows is its own, where that is the loss of its head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import isotune
from isotune.training import build_recipe, train
from isotune.training.tasks import chunked_loss as module
from isotune.training.tasks.chunked_loss import chunked_loss

SIZES: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip

pytestmark = pytest.mark.skipif(
    not hasattr(torch.nn.functional, "linear_cross_entropy"), reason="this torch has no linear_cross_entropy"
)


def llama_model(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes}))


def batch(rows: int = 3, tokens: int = 20) -> dict[str, Tensor]:
    ids = torch.randint(0, 300, (rows, tokens))
    labels = ids.clone()
    labels[:, :5] = -100
    return {"input_ids": ids, "labels": labels}


def gradients(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("items", [None, 37, torch.tensor(37)])
@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_are_the_models_own(items: Any, tied: bool) -> None:
    model, inputs = llama_model(tie_word_embeddings=tied).train(), {**batch(), "num_items_in_batch": items}
    loss, expected = gradients(model, inputs)
    with chunked_loss(model, large=2000) as chunked:
        assert chunked
        ours, found = gradients(model, inputs)
    torch.testing.assert_close(ours, loss)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    again, _ = gradients(model, inputs)
    assert torch.equal(again, loss)
    assert "forward" not in vars(model.lm_head)


def test_adapters_get_their_gradients_and_an_evaluation_its_logits() -> None:
    model = isotune.adapt(llama_model(), isotune.HRA(rank=4), "all-linear", seed=0).train()
    inputs = batch()
    loss, expected = gradients(model, inputs)
    with chunked_loss(model, large=2000):
        ours, found = gradients(model, inputs)
        shape = model.eval()(**inputs).logits.shape
    assert shape == (3, 20, 300)
    torch.testing.assert_close(ours, loss)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_no_batch_of_logits_is_made() -> None:
    seen: list[torch.Size] = []
    model = llama_model().train()
    with chunked_loss(model, large=2000):
        model.lm_head.register_forward_hook(lambda layer, given, out: seen.append(out.shape))
        model(**batch(rows=4, tokens=50)).loss.backward()
        model(**batch(rows=1, tokens=5))
    assert seen == [(4, 50, 32), (1, 5, 300)]


def capped() -> nn.Module:
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=1.0))


def mildly_capped() -> nn.Module:
    """Too mildly for the loss of a few tokens to show it in bf16."""
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=30.0)).bfloat16()


def adapted_head() -> nn.Module:
    return isotune.adapt(llama_model(), isotune.LoRA(rank=2), ["lm_head"], seed=0)


def other_loss() -> nn.Module:
    model = llama_model()
    own = model.loss_function
    model.loss_function = lambda **given: 2 * own(**given)
    return model


@pytest.mark.parametrize("make", [capped, mildly_capped, adapted_head, other_loss])
def test_a_model_whose_loss_is_not_that_of_its_head_keeps_its_own_way(make: Any) -> None:
    model, inputs = make().train(), batch()
    loss, expected = gradients(model, inputs)
    with chunked_loss(model, large=2000) as chunked:
        assert not chunked
        ours, found = gradients(model, inputs)
    assert torch.equal(ours, loss)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_low_precision_and_autocast_lose_no_more_than_the_model_does() -> None:
    inputs = batch()
    for model, cast in ((llama_model().bfloat16(), False), (llama_model(), True)):
        model.train()
        with chunked_loss(model, large=2000) as chunked, torch.autocast("cpu", torch.bfloat16, enabled=cast):
            assert chunked
            ours, found = gradients(model, inputs)
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            loss, _ = gradients(model, inputs)
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, loss.float(), rtol=1e-3, atol=0)
        assert all(g.isfinite().all() for g in found)


def test_gpt2_has_another_name_for_its_head() -> None:
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=300, n_embd=32, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=0, loss_type="ForCausalLM"
        )
    )
    with chunked_loss(model.eval()) as chunked:
        assert chunked


def test_a_run_learns_the_same_with_chunks_and_checkpointing(
    llama: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[bool] = []
    real = module._Chunks._loss

    def watched(self: Any, logits: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        used.append(logits.shape[-1] != self.head.out_features)
        return real(self, logits, *args, **kwargs)

    monkeypatch.setattr(module._Chunks, "_loss", watched)
    losses = {}
    for name, large, checkpointing in (("whole", 2**24, False), ("chunks", 64, False), ("both", 64, True)):
        monkeypatch.setattr(module.chunked_loss.__wrapped__, "__defaults__", (large,))
        flags = {
            "model": str(llama), "task": "causal-lm", "data.train": str(prompts), "data.max_length": 32,
            "method.name": "hra", "method.rank": 2, "targets": "all-linear", "training.max_steps": 4,
            "training.activation_checkpointing": checkpointing, "output": str(tmp_path / name),
        }  # fmt: skip
        used.clear()
        train(build_recipe(flags=flags), progress=False)
        losses[name] = json.loads((tmp_path / name / "metrics.json").read_text())["train_loss"]
        assert any(used[2:]) == (name != "whole")
    assert losses["chunks"] == pytest.approx(losses["whole"], rel=1e-5)
    assert losses["both"] == pytest.approx(losses["whole"], rel=1e-5)
