"""Language models answer prompts in batches as they do one by one, chat, and are evaluated whoever made them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_more_tasks import CHAT, TEMPLATE
from tiny import write_jsonl

import isotune
from isotune.adapters.low_rank.lora import LoRA
from isotune.errors import DataError, IsotuneError, OptionError
from isotune.merging.models.merge import merge_checkpoints
from isotune.merging.registry import rule
from isotune.training.evaluation import evaluate
from isotune.training.generation import Talk, generate, prompts_and_answers
from isotune.training.opening import open_any
from isotune.training.prediction import predict
from isotune.training.recipe import build_recipe
from isotune.training.run import train
from isotune.training.tasks.answers import asked_and_wanted, exact_match, last_number, share_right

ROWS = [
    {"prompt": "the cat", "completion": "sees a dog"}, {"prompt": "a", "completion": "hen"},
    {"prompt": "the old green fox", "completion": "near the oak"},
]  # fmt: skip


@pytest.fixture(scope="module")
def run(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sentences, learnt by heart by the whole model."""
    folder = tmp_path_factory.mktemp("generation")
    rows = write_jsonl(folder / "rows.jsonl", ROWS * 16)
    flags: dict[str, Any] = {
        "model": str(llama), "task": "causal-lm", "data.train": str(rows), "data.validation": None,
        "output": str(folder / "run"), "method.name": "full", "training.learning_rate": 0.01,
        "training.num_train_epochs": 20, "training.report_to": "none",
    }  # fmt: skip
    return train(build_recipe(None, flags), progress=False).output


def test_answers_in_a_batch_are_those_one_by_one(run: Path) -> None:
    session = open_any(run, "causal-lm")
    prompts, wanted = prompts_and_answers(ROWS, session)
    assert len({len(prompt) for prompt in prompts}) > 1
    seen: list[int] = []
    together = generate(session, prompts, 8, batch_size=2, advance=seen.append)
    alone = [generate(session, [prompt], 8)[0] for prompt in prompts]
    assert together == alone == wanted == [row["completion"] for row in ROWS]
    assert seen == [2, 1]
    assert generate(session, prompts, 1) == [answer.split()[0] for answer in together]


def test_evaluate_counts_the_answers_that_are_right(run: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "x.jsonl", [*ROWS, {"prompt": "the cat", "completion": "sees a hen"}])
    lines = tmp_path / "answers.jsonl"
    found = evaluate(run, str(rows), generate=8, predictions=lines, progress=False)
    assert found["exact_match"] == 3 / 4
    assert found["loss"] > 0
    assert [json.loads(line)["prediction"] for line in lines.read_text().splitlines()][3] == "sees a dog"


def judged(llama: Path, folder: Path, **more: Any) -> Any:
    rows = write_jsonl(folder / "rows.jsonl", ROWS * 4)
    flags: dict[str, Any] = {
        "model": str(llama), "task": "causal-lm", "data.train": str(rows), "data.validation": str(rows),
        "data.test": str(rows), "output": str(folder / "run"), "metric": "exact_match", "method.name": "full",
        "training.learning_rate": 0.01, "training.num_train_epochs": 60, "training.eval_strategy": "steps",
        "training.eval_steps": 30, "training.report_to": "none",
    }  # fmt: skip
    return build_recipe(None, {**flags, **more})


def test_a_run_judged_by_exact_match_answers_its_rows_at_each_validation(llama: Path, tmp_path: Path) -> None:
    result = train(judged(llama, tmp_path), progress=False)
    history = json.loads((result.output / "history.json").read_text())
    assert [entry["step"] for entry in history if "eval_exact_match" in entry] == [30, 60]
    assert result.metrics["test_base_exact_match"] == 0
    assert result.metrics["validation_exact_match"] == result.metrics["test_exact_match"] == 1
    assert result.metrics["test_exact_match_interval"][1] == 1
    assert "test_exact_match_number" not in result.metrics
    again = evaluate(result.output, str(tmp_path / "rows.jsonl"), generate=8, progress=False)
    assert again["exact_match"] == 1


def test_a_run_judged_by_its_loss_writes_nothing(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    assert not [name for name in metrics if "exact_match" in name]


@pytest.mark.parametrize(
    ("more", "said"),
    [({"data.packing": True}, "packed rows share their sequences"), ({"data.text": "prompt"}, "plain text asks")],
)
def test_answers_that_cannot_be_told_apart_are_refused_at_the_start(
    llama: Path, tmp_path: Path, more: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataError, match=f"metric: exact_match counts answers, and {said}"):
        train(judged(llama, tmp_path, **more), progress=False)
    assert not (tmp_path / "run").exists()


def test_of_a_chat_the_last_answer_is_asked_for(run: Path) -> None:
    session = open_any(run, "causal-lm")
    example = session.examples(ROWS[:1])[0]
    first, asked = [5, 6, 7], example["labels"].count(-100)
    chat = {
        "input_ids": [*first, *example["input_ids"], 1],
        "labels": [-100, *first[1:], *example["labels"], -100],
    }
    own = share_right(session.model, session.tokenizer, [example], "text", 2)
    assert own == 1
    prompt, wanted = asked_and_wanted(chat, apart=False)
    assert prompt == [*first, *example["input_ids"][:asked]]
    assert wanted == example["input_ids"][asked:]


def test_prompts_without_answers_are_answered(run: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "x.jsonl", [{"prompt": row["prompt"]} for row in ROWS])
    lines = tmp_path / "answers.csv"
    with pytest.raises(DataError, match="no column 'completion'"):
        evaluate(run, str(rows), progress=False)
    assert predict(run, str(rows), lines, max_new_tokens=8, progress=False) == 3
    assert lines.read_text().splitlines()[1] == "the cat,sees a dog"


@pytest.mark.parametrize(
    ("text", "number"),
    [("so 3 + 4 = 7 eggs", 7), ("#### 1,234", 1234), ("$-2.50.", -2.5), ("none", None), ("7 and -.5", -0.5)],
)
def test_the_last_number_of_an_answer(text: str, number: float | None) -> None:
    assert last_number(text) == number


def test_answers_match_by_text_or_by_number() -> None:
    assert exact_match([" a 3 ", "b 4"], ["a 3", "so 4.0"]) == 1 / 2
    assert exact_match(["a 3", "b 4", "none", "9"], ["x 3", "so 4.0", "none", "8"], "number") == 2 / 4


def test_plain_text_asks_for_nothing(run: Path) -> None:
    with pytest.raises(DataError, match="plain text asks for nothing"):
        prompts_and_answers([{"text": "the cat"}], open_any(run, "causal-lm"))


def test_a_model_that_is_no_language_model_answers_nothing(bert: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "x.jsonl", [{"text": w, "label": w} for w in ("cat", "oak") * 8])
    flags = {"model": str(bert), "data.train": str(rows), "output": str(tmp_path / "run"), "training.max_steps": 1}
    output = train(build_recipe(None, flags), progress=False).output
    with pytest.raises(OptionError, match="a classification model cannot chat"):
        Talk(open_any(output, "causal-lm"))
    with pytest.raises(DataError, match="plain text asks"):
        evaluate(output, str(rows), generate=8, progress=False)


# What no run of ours made


def test_a_pretrained_model_is_evaluated_by_its_folder(llama: Path, run: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "x.jsonl", ROWS)
    before, after = (evaluate(path, str(rows), task="causal-lm", progress=False) for path in (llama, run))
    assert after["loss"] < 0.5 < 2 < before["loss"]
    with pytest.raises(IsotuneError, match=r"has no task\.json"):
        evaluate(llama, str(rows), progress=False)
    with pytest.raises(OptionError, match=r"task 'causal_lm' is unknown. Did you mean 'causal-lm'"):
        evaluate(llama, str(rows), task="causal_lm", progress=False)
    with pytest.raises(IsotuneError, match="names no labels of its own"):
        evaluate(llama, str(rows), task="classification", progress=False)


def test_a_lora_of_anyones_and_a_merged_model_are_evaluated(llama: Path, run: Path, tmp_path: Path) -> None:
    rows, model = write_jsonl(tmp_path / "x.jsonl", ROWS), str(llama)
    base = open_any(llama, "causal-lm").model
    isotune.adapt(base, LoRA(rank=2), "attention")
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)
    isotune.save(base, tmp_path / "adapter", base_model=model)
    isotune.export_lora(tmp_path / "adapter", tmp_path / "lora")
    one, other = (
        evaluate(tmp_path / name, str(rows), task="causal-lm", progress=False) for name in ("adapter", "lora")
    )
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    trained = run / "model"
    merge_checkpoints([trained, llama], rule("linear"), tmp_path / "merged", weights=[1.0, 0.0], progress=False)
    merged, whole = (
        evaluate(path, str(rows), task="causal-lm", progress=False) for path in (tmp_path / "merged", run)
    )
    assert merged["loss"] == pytest.approx(whole["loss"], rel=1e-5)


def test_rows_without_labels_are_predicted(bert: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "x.jsonl", [{"text": w, "label": w} for w in ("cat", "oak") * 8])
    flags = {"model": str(bert), "data.train": str(rows), "output": str(tmp_path / "run"), "training.max_steps": 1}
    output = train(build_recipe(None, flags), progress=False).output
    bare, lines = write_jsonl(tmp_path / "bare.jsonl", [{"text": "cat"}, {"text": "oak"}]), tmp_path / "told.jsonl"
    assert predict(output, str(bare), lines, progress=False) == 2
    assert [json.loads(line)["prediction"] for line in lines.read_text().splitlines()] == ["cat", "oak"]
    with pytest.raises(DataError, match="no column 'label'"):
        evaluate(output, str(bare), progress=False)


# Chats


def test_a_chat_keeps_what_was_said(llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "talker"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    rows = write_jsonl(tmp_path / "x.jsonl", [{"messages": CHAT}] * 32)
    flags: dict[str, Any] = {
        "model": str(folder), "task": "causal-lm", "data.train": str(rows), "data.validation": None,
        "output": str(tmp_path / "run"), "method.name": "full", "training.learning_rate": 0.01,
        "training.num_train_epochs": 20, "training.report_to": "none",
    }  # fmt: skip
    talk = Talk(open_any(train(build_recipe(None, flags), progress=False).output, "causal-lm"))
    assert talk.ask("the cat", 8) == "sees a dog"
    assert talk.ask("and", 8) == "a hen"
    assert talk.messages == CHAT
    talk.reset()
    assert talk.messages == []


def test_a_model_without_a_template_answers_as_it_was_trained(run: Path) -> None:
    talk = Talk(open_any(run, "causal-lm"))
    assert [talk.ask(row["prompt"], 8) for row in ROWS] == [row["completion"] for row in ROWS]
