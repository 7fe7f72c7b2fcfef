"""Full fine-tuning: the same run without an adapter, its folder, its resumption, and what it refuses."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from forked import start_slowly
from safetensors.torch import load_file
from tiny import write_recipe

from isotune.errors import IsotuneError
from isotune.training import Recipe, Result, build_recipe, evaluate, train
from isotune.training.export import export_merged
from isotune.training.folder import adapter_folder
from isotune.training.full import LEARNING_RATE

SAVE_STEPS = "training.save_steps=9"
"""A checkpoint at the end of each epoch, before its validation."""


def full_recipe(folder: Path, bert: Path, rows: Path, *sets: str) -> Recipe:
    file = write_recipe(folder / "recipe.yaml", bert, rows, folder / "run")
    return build_recipe(
        file, sets=["method={name: full}", "targets=attention", "training.learning_rate=1e-4", SAVE_STEPS, *sets]
    )


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As in the process that is killed, so that bits can be compared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(bert: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A finished run, with its model."""
    return train(full_recipe(tmp_path_factory.mktemp("whole"), bert, rows), progress=False)


def moved(result: Result, to: Path) -> Path:
    """A copy of a run's folder, of which the copied recipe knows."""
    run = shutil.copytree(result.output, to)
    text = (run / "recipe.yaml").read_text().replace(str(result.output), str(run))
    (run / "recipe.yaml").write_text(text)
    return run


def history(run: Path) -> list[dict[str, Any]]:
    """What does not depend on the clock."""
    keys = ("step", "epoch", "loss", "eval_loss", "eval_accuracy")
    entries = json.loads((run / "history.json").read_text())
    return [{key: entry[key] for key in keys if key in entry} for entry in entries]


def assert_same_model(one: Path, other: Path) -> None:
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def test_every_parameter_trains(whole: Result, bert: Path) -> None:
    before = {f"bert.{key}": tensor for key, tensor in load_file(bert / "model.safetensors").items()}
    after = load_file(whole.trained / "model.safetensors")
    assert after.keys() == {*before, "classifier.weight", "classifier.bias"}
    assert [key for key in before if after[key].equal(before[key])] == []
    assert whole.metrics["trainable_parameters_encoder"] == sum(tensor.numel() for tensor in before.values())
    assert whole.metrics["trainable_parameters"] == whole.metrics["trainable_parameters_encoder"] + 2 * 33


def test_metrics_have_the_keys_of_an_adapters_run(whole: Result, bert: Path, rows: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", bert, rows, tmp_path / "run", max_steps=1)
    adapter = train(build_recipe(recipe), progress=False)
    assert list(whole.metrics) == list(adapter.metrics)
    assert whole.metrics["method"] == "full"
    assert whole.metrics["learning_rate_is_the_methods_default"] == (whole.metrics["learning_rate"] == LEARNING_RATE)
    assert adapter.trained == adapter.adapter == tmp_path / "run" / "adapter"


def test_the_run_and_its_model_folder_evaluate_to_its_metrics(whole: Result, rows: Path, tmp_path: Path) -> None:
    assert whole.trained == whole.output / "model"
    apart = shutil.copytree(whole.trained, tmp_path / "apart")
    for found in (evaluate(whole.output, progress=False),
                  evaluate(apart, str(rows / "test.jsonl"), progress=False)):  # fmt: skip
        assert found["rows"] == 15
        assert found["accuracy"] == whole.metrics["test_accuracy"]
        assert found["loss"] == pytest.approx(whole.metrics["test_loss"], rel=1e-5)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(apart)
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, whole.model.state_dict()[key]), key
    assert transformers.AutoTokenizer.from_pretrained(apart).vocab_size > 0


def test_a_run_killed_in_the_middle_resumes_to_the_same_bits(
    whole: Result, bert: Path, rows: Path, tmp_path: Path
) -> None:
    file = tmp_path / "full.yaml"
    file.write_text(full_recipe(tmp_path, bert, rows).to_yaml())
    process = start_slowly("train", file)
    process.signal_at_step(13, signal.SIGKILL, 0.02)
    process.end()
    run = tmp_path / "run"
    assert (run / "checkpoint-9" / "complete").is_file()
    assert not (run / "model").exists()
    train(build_recipe(run / "recipe.yaml"), resume=True, progress=False)
    assert_same_model(run / "model", whole.trained)
    assert history(run) == history(whole.output)


@pytest.mark.parametrize("left", [18, 27])
def test_a_validation_that_a_crash_prevented_is_made_up_for(whole: Result, tmp_path: Path, left: int) -> None:
    run = moved(whole, tmp_path / "run")
    for folder in run.glob("checkpoint-*"):
        if int(folder.name[11:]) > left:
            shutil.rmtree(folder)
    state = json.loads((run / f"checkpoint-{left}" / "trainer_state.json").read_text())
    assert state["log_history"][-1]["step"] == left
    assert "eval_loss" not in state["log_history"][-1]
    shutil.rmtree(run / "model")
    for name in ("metrics.json", "history.json"):
        (run / name).unlink()
    train(build_recipe(run / "recipe.yaml"), resume=True, progress=False)
    assert_same_model(run / "model", whole.trained)
    assert history(run) == history(whole.output)
    assert [entry["step"] for entry in history(run) if "eval_loss" in entry] == [9, 18, 27]


def test_a_language_model_is_trained_in_full(llama: Path, prompts: Path, tmp_path: Path) -> None:
    flags = {
        "model": str(llama), "task": "causal-lm", "data.train": str(prompts), "data.test": str(prompts),
        "data.prompt": "question", "data.completion": "answer", "data.max_length": 32, "method": "full",
        "training.max_steps": 2, "output": str(tmp_path / "run"),
    }  # fmt: skip
    result = train(build_recipe(flags=flags), progress=False)
    assert result.metrics["trainable_parameters"] == sum(p.numel() for p in result.model.parameters())
    found = evaluate(result.trained, progress=False)
    assert found["perplexity"] == pytest.approx(result.metrics["test_perplexity"], rel=1e-5)
    transformers.AutoModelForCausalLM.from_pretrained(result.trained)


def test_a_merged_export_evaluates_as_its_run(bert: Path, rows: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", bert, rows, tmp_path / "run", max_steps=6)
    result = train(build_recipe(recipe), progress=False)
    merged = export_merged(result.adapter, tmp_path / "merged")
    found = evaluate(merged, str(rows / "test.jsonl"), progress=False)
    assert found["accuracy"] == result.metrics["test_accuracy"]
    assert found["loss"] == pytest.approx(result.metrics["test_loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("method.rank=4", r"method full has no options: method.rank"),
        ("targets=mlp", "targets: method full trains every layer"),
        ("overrides={query: {rank: 2}}", "overrides: method full trains every layer"),
        ("dtype=bfloat16", "dtype: bfloat16 is for a frozen base"),
        ("training.fsdp=full_shard", r"training.fsdp does not go with method full"),
    ],
)
def test_what_belongs_to_adapters_is_refused(
    bert: Path, rows: Path, tmp_path: Path, changed: str, message: str
) -> None:
    with pytest.raises(IsotuneError, match=message):
        train(full_recipe(tmp_path, bert, rows, changed), progress=False)
    assert not (tmp_path / "run").exists()


def test_what_wants_an_adapter_says_that_the_run_has_none(whole: Result) -> None:
    with pytest.raises(IsotuneError, match="trained the whole model"):
        adapter_folder(whole.output)
    with pytest.raises(IsotuneError, match="trained the whole model"):
        _ = whole.adapter
    with pytest.raises(IsotuneError, match="leave out --model minilm"):
        evaluate(whole.output, model="minilm", progress=False)
