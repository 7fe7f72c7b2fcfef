"""An encoder-decoder learns to write what it read, and is measured by what it writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny import save_tokenizer, write_jsonl

from isotune.cli import app
from isotune.errors import DataError, IsotuneError, OptionError
from isotune.training.evaluation import evaluate
from isotune.training.forgetting import Forgetting, ForgettingSettings
from isotune.training.generation import Talk, generate, prompts_and_answers
from isotune.training.opening import open_any
from isotune.training.recipe import build_recipe
from isotune.training.run import train

ROWS = [
    {"source": "the cat sees", "target": "a dog"}, {"source": "a hen", "target": "near the oak and the fir"},
    {"source": "the old green fox sees a small owl", "target": "the ivy"},
]  # fmt: skip


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random T5 of two layers each."""
    folder = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=save_tokenizer(folder, classify=True), d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2,
        pad_token_id=0, eos_token_id=3, decoder_start_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


def flags(model: Path, rows: Path, output: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": str(model), "task": "seq2seq-lm", "data.train": str(rows), "data.validation": None,
        "output": str(output), "training.report_to": "none", **more,
    }  # fmt: skip


def test_what_was_learnt_by_heart_is_written(t5: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "x.jsonl", ROWS * 16)
    more = {
        "method.name": "full", "training.learning_rate": 0.01, "training.num_train_epochs": 20,
        "data.test": str(write_jsonl(tmp_path / "y.jsonl", ROWS)), "metric": "exact_match",
    }  # fmt: skip
    result = train(build_recipe(None, flags(t5, rows, tmp_path / "run", **more)), progress=False)
    assert result.metrics["test_exact_match"] == 1.0
    run, lines = result.output, tmp_path / "told.jsonl"
    found = evaluate(run, generate=12, predictions=lines, progress=False)
    assert found["exact_match"] == 1.0
    assert found["loss"] < 0.5
    assert [json.loads(line)["prediction"] for line in lines.read_text().splitlines()] == [r["target"] for r in ROWS]
    session = open_any(run, "seq2seq-lm")
    prompts, wanted = prompts_and_answers([{"prompt": r["source"], "completion": r["target"]} for r in ROWS], session)
    assert generate(session, prompts, 12, batch_size=2) == wanted  # of different lengths, padded behind
    with pytest.raises(IsotuneError, match="a seq2seq-lm model cannot chat"):
        Talk(session)


def test_the_loss_is_the_models_own(t5: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "x.jsonl", ROWS)
    found = evaluate(t5, str(rows), task="seq2seq-lm", progress=False)
    session = open_any(t5, "seq2seq-lm")
    batch = session.collator(session.examples([{"prompt": r["source"], "completion": r["target"]} for r in ROWS]))
    assert batch["labels"].shape[1] != batch["input_ids"].shape[1]
    with torch.no_grad():
        assert found["loss"] == pytest.approx(session.model.eval()(**batch).loss.item(), rel=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(found["loss"]))


def test_what_is_forgotten_is_the_perplexity_of_other_completions(t5: Path, tmp_path: Path) -> None:
    renamed = [{"asked": row["source"], "told": row["target"]} for row in ROWS]
    other = write_jsonl(tmp_path / "other.jsonl", renamed)
    settings = ForgettingSettings(test=str(other), prompt="asked", completion="told", max_length=32, batch_size=2)
    session = open_any(t5, "seq2seq-lm")
    forgetting = Forgetting(settings, session.spec)
    rows = write_jsonl(tmp_path / "x.jsonl", ROWS)
    expected = evaluate(t5, str(rows), task="seq2seq-lm", progress=False)
    assert forgetting.base == {"perplexity": pytest.approx(expected["perplexity"], rel=1e-5)}
    assert forgetting.measure(session.model) == forgetting.base
    with torch.no_grad():
        for parameter in session.model.parameters():
            parameter.mul_(2)  # surer of the same random words
    assert forgetting.measure(session.model)["perplexity"] > 1.1 * forgetting.base["perplexity"]
    with pytest.raises(OptionError, match="of a seq2seq-lm, prompts and completions"):
        Forgetting(ForgettingSettings(train=str(other)), session.spec)


def test_the_columns_of_forgetting_are_named_on_the_command_line(
    t5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_jsonl(tmp_path / "x.jsonl", ROWS)
    other = write_jsonl(tmp_path / "other.jsonl", [{"told": row["target"], "asked": row["source"]} for row in ROWS])
    named = ["--forgetting", str(other), "--forgetting-prompt", "asked", "--forgetting-completion", "told"]
    arguments = ["isotune", "evaluate", str(t5), "--task", "seq2seq-lm", "--data", str(rows), *named, "--json"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stop:
        app.main()
    assert not stop.value.code
    found = json.loads(capsys.readouterr().out)
    assert found["forgetting_base_perplexity"] == pytest.approx(found["perplexity"], rel=1e-5)


def test_an_adapter_on_the_whole_model_trains_and_resumes_its_task(t5: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "x.jsonl", ROWS * 8)
    more = {"targets": "all-linear", "method.rank": 4, "training.max_steps": 20, "training.learning_rate": 0.02}
    result = train(build_recipe(None, flags(t5, rows, tmp_path / "run", **more)), progress=False)
    before = evaluate(t5, str(rows), task="seq2seq-lm", progress=False)
    assert evaluate(result.output, str(rows), progress=False)["loss"] < before["loss"]


def test_what_is_no_seq2seq_is_refused(t5: Path, llama: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "x.jsonl", ROWS * 8)
    with pytest.raises(IsotuneError, match="a llama model is no encoder-decoder"):
        train(build_recipe(None, flags(llama, rows, tmp_path / "run")), progress=False)
    with pytest.raises(DataError, match="reads prompts and writes completions"):
        train(build_recipe(None, flags(t5, rows, tmp_path / "run", **{"data.text": "source"})), progress=False)
    assert not (tmp_path / "run").exists()
