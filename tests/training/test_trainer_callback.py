"""`transformers.Trainer` with our callback: small checkpoints that resume, penalties, and what follows a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

import isotune
from isotune import HRA
from isotune.integrations.transformers import AdapterCallback


def adapted(llama: Path, **options: Any) -> Any:
    model = LlamaForCausalLM.from_pretrained(llama)
    return isotune.adapt(model, HRA(rank=2, **options), "all-linear", train_also=["model.norm"], seed=0)


def trainer(model: Any, output: Path, **arguments: Any) -> Trainer:
    rows = [{"input_ids": (torch.arange(6) + n) % 9 + 3, "labels": (torch.arange(6) + n) % 9 + 3} for n in range(8)]
    settings = TrainingArguments(
        output_dir=str(output), max_steps=4, save_steps=2, per_device_train_batch_size=4, learning_rate=1e-2,
        report_to="none", disable_tqdm=True, use_cpu=True, **arguments,
    )  # fmt: skip
    return Trainer(model=model, args=settings, train_dataset=rows, callbacks=[AdapterCallback()])  # type: ignore[arg-type]


def trained_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def test_a_checkpoint_holds_the_adapter_alone_and_resumes(llama: Path, tmp_path: Path) -> None:
    model = adapted(llama)
    trainer(model, tmp_path / "run").train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert not (checkpoint / "config.json").exists()
    held = load_file(checkpoint / "model.safetensors")
    assert held.keys() == {key for key in model.state_dict() if ".isotune." in key}
    fresh = isotune.load(LlamaForCausalLM.from_pretrained(llama), checkpoint / "adapter")
    loaded = fresh.state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in held.items())
    again = adapted(llama)
    trainer(again, tmp_path / "run").train(resume_from_checkpoint=str(checkpoint))
    for name, tensor in trained_of(model).items():
        assert torch.equal(tensor, again.get_parameter(name)), name


def test_what_is_saved_after_training_is_whole_again(llama: Path, tmp_path: Path) -> None:
    model = adapted(llama)
    trainer(model, tmp_path / "run", save_strategy="epoch").train()
    isotune.fold(model).save_pretrained(tmp_path / "folded")
    kept = load_file(tmp_path / "folded" / "model.safetensors")
    assert "model.layers.0.self_attn.q_proj.weight" in kept


def test_the_penalty_and_what_follows_a_step_take_part(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[float] = []
    monkeypatch.setattr(isotune, "after_step", lambda model, progress, optimizer: done.append(progress))
    without, weighed = adapted(llama), adapted(llama, penalty=10.0)
    trainer(without, tmp_path / "a").train()
    assert done == [0.25, 0.5, 0.75, 1.0]
    before = float(isotune.penalty(weighed).detach())
    trainer(weighed, tmp_path / "b").train()
    assert float(isotune.penalty(weighed).detach()) < before
    assert not torch.equal(*(m.model.layers[0].mlp.up_proj.isotune["default"].U for m in (without, weighed)))
