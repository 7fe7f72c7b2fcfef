"""Preferences are learnt as TRL's DPO learns them, with the adapter switched off for a reference."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from test_more_tasks import TEMPLATE
from tiny import write_jsonl
from transformers import LlamaForCausalLM
from trl import DPOConfig, DPOTrainer

import isotune
from isotune import LoRA
from isotune.errors import DataError, OptionError
from isotune.training.evaluation import evaluate
from isotune.training.models import load_tokenizer
from isotune.training.opening import open_any
from isotune.training.recipe import build_recipe
from isotune.training.run import train

ROWS = [
    {"prompt": "the cat", "chosen": "sees a dog", "rejected": "near the old oak and a fig"},
    {"prompt": "a hen and an owl", "chosen": "near the small fox", "rejected": "dog"},
]


def flags(llama: Path, rows: Path, output: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": str(llama), "task": "preference", "data.train": str(rows), "data.test": 0.25,
        "data.validation": None, "output": str(output), "targets": "all-linear", "method.name": "lora",
        "method.rank": 4, "training.max_steps": 12, "training.learning_rate": 0.01,
        "training.per_device_train_batch_size": 4, "training.report_to": "none", "training.logging_steps": 1, **more,
    }  # fmt: skip


def moved(model: Any) -> Any:
    isotune.adapt(model, LoRA(rank=2), "all-linear", seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return model


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_the_loss_is_trls(llama: Path, tmp_path: Path) -> None:
    """TRL is given the same tokens, and the bare base, which is the adapter switched off, for a reference."""
    session = open_any(llama, "preference")
    moved(session.model)
    batch = session.collator(session.examples(ROWS))
    loss, outputs = session.task.loss(session.model, batch, session.spec) or (None, {})
    assert loss is not None
    theirs = DPOTrainer(
        model=isotune.as_peft(moved(LlamaForCausalLM.from_pretrained(llama))),
        ref_model=LlamaForCausalLM.from_pretrained(llama),
        args=DPOConfig(
            output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, per_device_eval_batch_size=2,
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list(ROWS),
        eval_dataset=datasets.Dataset.from_list([{**row, "prompt": f"{row['prompt']}\n"} for row in ROWS]),
        processing_class=load_tokenizer(str(llama)),
    ).evaluate()  # fmt: skip
    assert float(loss.detach()) == pytest.approx(theirs["eval_loss"], rel=1e-4)
    assert float(outputs["logits"].mean()) == pytest.approx(theirs["eval_rewards/margins"], rel=1e-3)


def test_what_is_preferred_is_learnt_and_the_run_begins_at_log_2(llama: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "x.jsonl", ROWS * 8)
    result = train(build_recipe(None, flags(llama, rows, tmp_path / "run")), progress=False)
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert result.metrics["test_accuracy"] == 1.0
    assert result.metrics["test_loss"] < 0.65
    lines = tmp_path / "told.jsonl"
    again = evaluate(result.output, str(rows), predictions=lines, progress=False)
    assert again["accuracy"] == 1.0
    assert again["margin"] > 0
    told = [json.loads(line) for line in lines.read_text().splitlines()]
    assert len(told) == 16
    assert {row["prediction"] for row in told} == {"chosen"}
    bare = evaluate(llama, str(rows), task="preference", progress=False)
    assert (bare["margin"], bare["loss"]) == (0, pytest.approx(math.log(2)))


def test_a_resumed_run_goes_on_to_the_same_bits(llama: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "x.jsonl", ROWS * 8)
    whole = train(
        build_recipe(None, flags(llama, rows, tmp_path / "a", **{"training.save_steps": 6})), progress=False
    )
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for name in ("metrics.json", "history.json"):
        (tmp_path / "b" / name).unlink()
    shutil.rmtree(tmp_path / "b" / "adapter")
    shutil.rmtree(tmp_path / "b" / "checkpoint-12")
    recipe = build_recipe(tmp_path / "b" / "recipe.yaml", {"output": str(tmp_path / "b")})
    again = train(recipe, resume=True, progress=False)
    assert again.metrics["test_margin"] == whole.metrics["test_margin"]


def test_chats_differ_in_their_last_answer_alone(llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "talker"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    asked = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sees"},
             {"role": "user", "content": "and"}]  # fmt: skip
    row = {
        name: [*asked, {"role": "assistant", "content": word}]
        for name, word in (("chosen", "dog"), ("rejected", "fig"))
    }
    session = open_any(folder, "preference")
    (example,) = session.examples([row])
    said = [[i for i in labels if i != -100] for labels in example["labels"]]
    assert [session.tokenizer.decode(ids) for ids in said] == ["dog [SEP]", "fig [SEP]"]
    with pytest.raises(DataError, match="the chats of row 1 differ in more than the assistant's last answer"):
        session.examples([{**row, "rejected": [asked[2], row["rejected"][-1]]}])
    with pytest.raises(DataError, match="row 1 has answers and no prompt"):
        session.examples([{"chosen": "a", "rejected": "b"}])


def test_a_full_fine_tuning_has_no_reference(llama: Path, tmp_path: Path) -> None:
    given = flags(llama, write_jsonl(tmp_path / "x.jsonl", ROWS * 8), tmp_path / "run")
    del given["method.rank"], given["targets"]
    with pytest.raises(OptionError, match="has the model without its adapter for a reference"):
        train(build_recipe(None, {**given, "method.name": "full"}), progress=False)
