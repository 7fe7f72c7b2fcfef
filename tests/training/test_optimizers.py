"""The key `optimizer` of recipes, and our optimizers in other people's trainers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from tiny import assert_same_bits
from transformers import LlamaForCausalLM, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

import isotune
from isotune.adapters.registry import method_class
from isotune.comparison.plan import make_plan
from isotune.comparison.recipe import build_comparison
from isotune.errors import IsotuneError
from isotune.integrations.transformers import AdapterCallback
from isotune.optim import OPTIMIZERS, Muon
from isotune.training import build_recipe, train
from isotune.training.models import load_tokenizer

IN_RECIPES = sorted(OPTIMIZERS.keys() - {"scion_light"})


def recipe_of(path: Path, model: Path, rows: Path, optimizer: Any, **changes: Any) -> Path:
    """Six steps with a checkpoint after three."""
    recipe = {
        "model": str(model),
        "data": {"train": str(rows / "train.jsonl"), "validation": None, "max_length": 8},
        "method": {"name": "lora", "rank": 2},
        "optimizer": optimizer,
        "targets": "query-value",
        "head": "random",
        "training": {"max_steps": 6, "per_device_train_batch_size": 4, "save_steps": 3, "weight_decay": 0.1},
        "output": str(path / "run"),
        **changes,
    }
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return path / "recipe.yaml"


@pytest.mark.parametrize("name", IN_RECIPES)
def test_a_run_with_every_optimizer_resumes_to_the_same_bits(
    name: str, bert: Path, rows: Path, tmp_path: Path
) -> None:
    found = train(build_recipe(recipe_of(tmp_path, bert, rows, name)), progress=False)
    assert found.metrics["optimizer"] == name
    run = tmp_path / "run"
    shutil.copytree(run / "adapter", tmp_path / "whole")
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoint-6")
    (run / "metrics.json").unlink()
    again = train(build_recipe(tmp_path / "recipe.yaml"), resume=True, progress=False)
    assert again.metrics["train_loss"] == found.metrics["train_loss"]
    assert_same_bits(run / "adapter", tmp_path / "whole")


def test_options_and_the_bare_name_and_full_fine_tuning(bert: Path, rows: Path, tmp_path: Path) -> None:
    recipe = recipe_of(
        tmp_path, bert, rows, {"name": "normuon", "momentum": 0.8, "beta2": 0.9}, method="full", targets="attention"
    )
    found = train(build_recipe(recipe), progress=False)
    state = torch.load(tmp_path / "run" / "checkpoint-6" / "optimizer.pt", weights_only=True)
    groups = state["param_groups"]
    assert {(group["momentum"], group["beta2"], group["adjust_lr_fn"]) for group in groups} == {(0.8, 0.9, "rms")}
    assert {group["algorithm"] for group in groups} == {"normuon", "adamw"}
    # As in the Trainer, norms and biases have no weight decay.
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}
    assert found.metrics["learning_rate_is_the_methods_default"]


@pytest.mark.parametrize(
    ("optimizer", "changes", "said"),
    [
        ("moun", {}, "optimizer 'moun' is unknown. Did you mean 'muon'"),
        ({"momentum": 0.9}, {}, "an optimizer needs a name"),
        ({"name": "muon", "nestrov": True}, {}, "unknown key 'optimizer.nestrov'. Did you mean 'nesterov'"),
        ({"name": "muon", "lr": 1.0}, {}, "optimizer.lr is decided elsewhere: use training.learning_rate"),
        ({"name": "muon", "method": "qr"}, {}, "optimizer muon: method is 'qr'; it is one of newton-schulz"),
        ("muon", {"training": {"optim": "adafactor"}}, "optimizer is muon, and training.optim 'adafactor'"),
        ("scion_light", {}, "a trainer sets to zero: use optimizer: scion"),
        ({"name": "odelora", "integrator": "rk4"}, {}, "a trainer has one gradient a step"),
        ("odelora", {"method": {"name": "hra", "rank": 2}}, "nothing here has such a pair"),
        ("muon", {"save_second_moments": True}, "save_second_moments needs training.optim to be"),
    ],
)
def test_what_cannot_be_is_said_at_once(
    optimizer: Any, changes: dict[str, Any], said: str, bert: Path, rows: Path, tmp_path: Path
) -> None:
    with pytest.raises(IsotuneError) as refused:
        train(build_recipe(recipe_of(tmp_path, bert, rows, optimizer, **changes)), progress=False)
    assert said in str(refused.value)
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_a_comparison_compares_optimizers(bert: Path, rows: Path, tmp_path: Path) -> None:
    recipe = json.loads(json.dumps(yaml.safe_load(recipe_of(tmp_path, bert, rows, None).read_text())))
    del recipe["method"]
    recipe["data"] |= {"validation": 0.2, "test": str(rows / "test.jsonl")}
    methods = [
        "lora",
        {"name": "lora", "optimizer": "adarem"},
        {"name": "lora", "optimizer": {"name": "muon", "momentum": 0.5}},
    ]
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump({**recipe, "compare": {"methods": methods, "full": False}}))
    comparison = build_comparison(tmp_path / "compare.yaml")
    plain, adarem, muon, _ = make_plan(comparison)
    own = method_class("lora").learning_rate
    assert [plain.rate, adarem.rate, muon.rate] == [own, 60 * own, own]
    assert muon.label == "lora optimizer=(muon momentum=0.5)"
    assert len({cell.key for cell in (plain, adarem, muon)}) == 3
    assert plain.parameters == muon.parameters
    run = comparison.run(muon.method, 0.1, 0, tmp_path / "one", test=False)
    assert run.optimizer == {"name": "muon", "momentum": 0.5}
    assert "optimizer" not in run.method
    assert comparison.run(adarem.method, 0.1, 0, tmp_path / "one", test=False).optimizer == {"name": "adarem"}
    methods[1] = {"name": "lora", "optimizer": "adaram"}
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump({**recipe, "compare": {"methods": methods}}))
    with pytest.raises(IsotuneError, match="optimizer 'adaram' is unknown"):
        build_comparison(tmp_path / "compare.yaml")


COMMON: dict[str, Any] = {
    "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none",
    "disable_tqdm": True, "use_cpu": True, "bf16": False,
}  # fmt: skip


def in_trainer(kind: str, llama: Path, output: Path) -> Any:
    """transformers' or TRL's trainer around an adapted model, with Muon."""
    model: Any = isotune.adapt(LlamaForCausalLM.from_pretrained(llama), isotune.LoRA(rank=2), "all-linear", seed=0)
    groups = isotune.parameter_groups(model, lr=1e-2, algorithm="muon")
    optimizer: Any = (Muon, {"params": groups, "weight_decay": 0.0})
    if kind == "transformers":
        rows = [
            {"input_ids": (torch.arange(6) + n) % 9 + 3, "labels": (torch.arange(6) + n) % 9 + 3} for n in range(8)
        ]
        arguments = TrainingArguments(str(output), **COMMON)
        return Trainer(
            model, arguments, train_dataset=rows, callbacks=[AdapterCallback()], optimizer_cls_and_kwargs=optimizer
        )  # type: ignore[arg-type]
    rows = [{"text": text} for text in ("a cat sees", "the dog near", "an old oak", "small green ivy")]
    return SFTTrainer(
        isotune.as_peft(model),
        args=SFTConfig(str(output), **COMMON),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=load_tokenizer(str(llama)),
        callbacks=[AdapterCallback()],
        optimizer_cls_and_kwargs=optimizer,
    )


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", ["transformers", "trl"])
def test_other_peoples_trainers_train_and_resume_with_our_optimizers(kind: str, llama: Path, tmp_path: Path) -> None:
    trainer = in_trainer(kind, llama, tmp_path)
    trainer.train()
    assert isinstance(getattr(trainer.optimizer, "optimizer", trainer.optimizer), Muon)
    moved = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    again = in_trainer(kind, llama, tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    resumed = dict(again.model.named_parameters())
    assert all(torch.equal(resumed[name], value) for name, value in moved.items())
    assert any(bool(value.any()) for name, value in moved.items() if name.endswith(".B"))
