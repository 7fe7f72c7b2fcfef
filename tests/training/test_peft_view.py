"""`as_peft`: what asks for a PeftModel trains our adapters. TRL's trainers, and Trainer on a quantised base."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
import transformers
from torch import Tensor
from transformers import LlamaForCausalLM, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import isotune
from isotune import HRA, LoRA
from isotune.errors import IsotuneError
from isotune.integrations.transformers import AdapterCallback
from isotune.training.models import load_tokenizer

# transformers and TRL about each other's names.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
METHODS = [HRA(rank=2), LoRA(rank=2)]
COMMON: dict[str, Any] = {
    "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1,
    "report_to": "none", "disable_tqdm": True, "use_cpu": True, "bf16": False, "seed": 0,
}  # fmt: skip


def adapted(llama: Path, method: isotune.Settings, moved: float = 0.0) -> Any:
    model = isotune.adapt(LlamaForCausalLM.from_pretrained(llama), method, "all-linear", seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(moved * torch.randn(p.shape, generator=generator))
    return model


def losses(trainer: Any) -> list[float]:
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def trained(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_the_view_shows_the_model_and_moves_nothing(llama: Path, tmp_path: Path) -> None:
    model = adapted(llama, HRA(rank=2), 0.3)
    names = list(model.state_dict())
    view = isotune.as_peft(model)
    assert isinstance(view, peft.PeftModel)
    assert view.get_base_model() is model
    assert list(model.state_dict()) == names
    ids = torch.tensor([[4, 5, 6]])
    assert view(ids).logits.equal(model(ids).logits)
    assert view.generate(input_ids=ids, max_new_tokens=3).equal(model.generate(input_ids=ids, max_new_tokens=3))
    with view.disable_adapter():
        assert view(ids).logits.equal(LlamaForCausalLM.from_pretrained(llama)(ids).logits)
    assert view.active_adapters == ["default"]
    assert view.get_nb_trainable_parameters()[0] == sum(row.trainable for row in isotune.describe(model))
    assert isotune.describe(view) == isotune.describe(model)  # the callbacks are given the view
    view.save_pretrained(tmp_path / "adapter")
    fresh = isotune.load(LlamaForCausalLM.from_pretrained(llama), tmp_path / "adapter")
    torch.testing.assert_close(fresh(ids).logits, model(ids).logits)


def test_a_copy_of_the_adapter_stays_what_it_was(llama: Path) -> None:
    model = adapted(llama, HRA(rank=2), 0.3)
    view, ids = isotune.as_peft(model), torch.tensor([[4, 5, 6]])
    view.add_adapter("ref", view.peft_config["default"])
    before = view(ids).logits
    with torch.no_grad():
        for parameter in trained(model):
            model.get_parameter(parameter).add_(1)
    assert not view(ids).logits.equal(before)
    learns = trained(model).keys()
    view.set_adapter("ref")
    torch.testing.assert_close(view(ids).logits, before)
    assert trained(model).keys() == learns
    view.set_adapter("default")
    assert view.active_adapters == ["default"]
    with pytest.raises(IsotuneError, match="'ref' cannot be added: it is there already"):
        view.add_adapter("ref")


def test_a_model_without_adapters_has_no_view(llama: Path) -> None:
    with pytest.raises(IsotuneError, match="none is in use on this model"):
        isotune.as_peft(LlamaForCausalLM.from_pretrained(llama))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_dpo_starts_at_log_2_after_the_adapter_was_trained_before(
    method: isotune.Settings, llama: Path, tmp_path: Path
) -> None:
    model = adapted(llama, method, 0.3)
    start = trained(model)
    rows = datasets.Dataset.from_list([{"prompt": "the cat", "chosen": " sees a dog", "rejected": " a fig"}] * 8)
    trainer = DPOTrainer(
        model=isotune.as_peft(model), args=DPOConfig(output_dir=str(tmp_path), **COMMON), train_dataset=rows,
        processing_class=load_tokenizer(str(llama)), callbacks=[AdapterCallback()],
    )  # fmt: skip
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses(trainer)[-1] < math.log(2)
    assert all(not tensor.equal(start[name]) for name, tensor in trained(model).items())
    # The reference is what the adapter was; the base was not touched, and what is saved is the adapter that learnt.
    ref = {name: model.get_parameter(name.replace(".default.", ".ref.")) for name in start}
    assert all(tensor.equal(ref[name]) for name, tensor in start.items())
    saved = isotune.load(LlamaForCausalLM.from_pretrained(llama), tmp_path / "checkpoint-4")
    assert all(saved.get_parameter(name).equal(tensor) for name, tensor in trained(model).items())


def test_sft_trains_saves_and_resumes(llama: Path, tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([{"prompt": "the cat", "completion": " sees a dog"}] * 8)

    def trainer(model: Any) -> Any:
        return SFTTrainer(
            model=isotune.as_peft(model), args=SFTConfig(output_dir=str(tmp_path), **COMMON), train_dataset=rows,
            processing_class=load_tokenizer(str(llama)),
        )  # fmt: skip

    model, again = adapted(llama, HRA(rank=2)), adapted(llama, HRA(rank=2), 1.0)
    (first := trainer(model)).train()
    assert losses(first)[-1] < losses(first)[0]
    assert not (tmp_path / "checkpoint-2" / "model.safetensors").exists()
    trainer(again).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, tensor in trained(model).items():
        assert tensor.equal(again.get_parameter(name)), name


def test_grpo_learns_what_is_rewarded(llama: Path, tmp_path: Path) -> None:
    model = adapted(llama, LoRA(rank=2), 0.1)
    start = trained(model)

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(text.split()))) for text in completions]

    given = {**COMMON, "max_steps": 2, "logging_steps": 1, "beta": 0.04}
    args = GRPOConfig(output_dir=str(tmp_path), num_generations=4, max_completion_length=6, **given)
    rows = datasets.Dataset.from_list([{"prompt": "the cat"}] * 8)
    trainer = GRPOTrainer(
        model=isotune.as_peft(model), reward_funcs=reward, args=args, train_dataset=rows,
        processing_class=load_tokenizer(str(llama)),
    )  # fmt: skip
    trainer.train()
    kl = [float(entry["kl"]) for entry in trainer.state.log_history if "kl" in entry]
    assert kl[0] == pytest.approx(0, abs=1e-6)  # the reference is what the adapter was
    assert any(not tensor.equal(start[name]) for name, tensor in trained(model).items())


def test_trainer_takes_adapters_on_a_quantised_base(llama: Path, tmp_path: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig

    how = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    model = isotune.adapt(LlamaForCausalLM.from_pretrained(llama, quantization_config=how), HRA(rank=2), "all-linear")
    rows = [{"input_ids": torch.arange(6) + 3, "labels": torch.arange(6) + 3}] * 8
    arguments = TrainingArguments(output_dir=str(tmp_path), **COMMON)

    def trainer(model: Any) -> Trainer:
        return Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[AdapterCallback()])  # type: ignore[arg-type]

    with pytest.raises(ValueError, match="purely quantized models"):
        trainer(model)
    (found := trainer(isotune.as_peft(model))).train()
    assert losses(found)[-1] < losses(found)[0]
    held = isotune.load(LlamaForCausalLM.from_pretrained(llama), tmp_path / "checkpoint-4" / "adapter")
    assert all(held.get_parameter(name).equal(tensor) for name, tensor in trained(model).items())
