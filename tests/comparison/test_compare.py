"""`isotune compare` from its recipe to its summary: tiny models, real training."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny import environment

from isotune.comparison import build_comparison, compare, one_run
from isotune.comparison.recipe import ComparisonRecipe
from isotune.comparison.results import Summary, Units
from isotune.comparison.store import Store
from isotune.errors import DivergedError, IsotuneError


def recipe(model: Path, rows: Path, output: Path, **more: Any) -> ComparisonRecipe:
    flags = {
        "model": str(model),
        "data.train": str(rows / "train.jsonl"),
        "data.test": str(rows / "test.jsonl"),
        "data.max_length": 16,
        "targets": "query-value",
        "training.num_train_epochs": 1,
        "training.per_device_train_batch_size": 8,
        "compare.methods": "hra,lora",
        "compare.budgets": [300],
        "compare.seeds": 2,
        "compare.trials": 2,
        "compare.cost_steps": 1,
        "output": str(output),
    }
    return build_comparison(flags=flags | {key.replace("__", "."): value for key, value in more.items()})


def held_out(rows: Path) -> dict[str, Any]:
    return {"compare__forgetting": {"train": str(rows / "train.jsonl"), "test": str(rows / "test.jsonl")}}


@pytest.fixture(scope="module")
def whole(bert: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> ComparisonRecipe:
    """A finished comparison."""
    made = recipe(bert, rows, tmp_path_factory.mktemp("whole") / "c", **held_out(rows))
    compare(made, progress=False)
    return made


def exact(output: str | Path) -> dict[str, Any]:
    """Of each unit what does not depend on the machine's speed."""
    vague = ("seconds_per_step", "tokens_per_second", "peak_memory_bytes")
    return {
        name: {key: value for key, value in line.metrics.items() if key not in vague}
        for name, line in Store(output).lines().items()
    }


def alike(output: str | Path) -> dict[str, Any]:
    """The same for a comparison with what other processes made.

    Their tensors are at other addresses, where vectorised sums may add in another order.
    """
    return {name: pytest.approx(metrics, rel=1e-4) for name, metrics in exact(output).items()}


def test_every_row_is_sized_searched_measured_and_summarised(whole: ComparisonRecipe) -> None:
    found = Summary.read(Store(whole.output).summary_file)
    rows = {row.method: row for row in found.rows}
    assert rows.keys() == {"hra", "lora", "full", "frozen"}
    assert (rows["hra"].parameters, rows["lora"].parameters) == (256, 256)
    assert found.units == Units(planned=17, done=17, failed=0)
    assert found.forgetting.keys() == {"probe_accuracy", "similarity"}
    for name in ("hra", "lora", "full"):
        row = rows[name]
        assert len(row.values) == len(row.runs) == 2
        assert f"{row.learning_rate:g}" == max(row.learning_rates, key=row.learning_rates.get)
        assert row.seconds_per_step > 0
        assert row.adapter_bytes > 1000
        assert 0 <= row.forgetting["similarity"].mean <= 1
    assert rows["frozen"].forgetting["similarity"].values == [1.0, 1.0]
    assert rows["hra"].export_rank == 2 * rows["lora"].export_rank
    assert rows["full"].export_rank is None
    assert rows["hra"].difference.values == [
        pytest.approx(one - other) for one, other in zip(rows["hra"].values, rows["lora"].values, strict=True)
    ]


def test_adapters_and_curves_of_the_seeds_are_kept_and_trials_leave_only_their_line(whole: ComparisonRecipe) -> None:
    lines = Store(whole.output).lines()
    runs = {path.name for path in (Path(whole.output) / "runs").iterdir()}
    kept = {name for name, line in lines.items() if line.kind == "seed" and line.method != "frozen"}
    assert runs == kept
    for name in kept:
        folder = Path(whole.output) / lines[name].run
        assert (folder / ("model" if "full" in name else "adapter")).is_dir()
        assert not list(folder.glob("checkpoint-*"))
        assert any("loss" in entry for entry in lines[name].curve)


def test_a_finished_comparison_is_not_run_again(whole: ComparisonRecipe) -> None:
    before = Store(whole.output).results_file.read_bytes()
    assert compare(whole, progress=False).units.done == 17
    assert Store(whole.output).results_file.read_bytes() == before


def test_killed_in_the_middle_it_goes_on_to_the_same_results(
    whole: ComparisonRecipe, bert: Path, rows: Path, tmp_path: Path
) -> None:
    made = recipe(bert, rows, tmp_path / "c", **held_out(rows))
    (tmp_path / "recipe.yaml").write_text(made.to_yaml())
    process = subprocess.Popen(
        [sys.executable, "-m", "isotune.cli", "compare", str(tmp_path / "recipe.yaml"), "--workers", "2"],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    results = tmp_path / "c" / "results.jsonl"
    deadline = time.monotonic() + 120
    while not (results.is_file() and results.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)  # ends only when the workers have ended, too: they hold the pipes
    done = set(Store(tmp_path / "c").lines())
    assert 3 <= len(done) < 17
    compare(made, progress=False)
    assert exact(tmp_path / "c") == alike(whole.output)


def test_more_methods_and_seeds_are_added_to_what_is_there(whole: ComparisonRecipe, bert: Path, rows: Path) -> None:
    before = Store(whole.output).lines()
    more = recipe(
        bert, rows, Path(whole.output), **held_out(rows), compare__methods="hra,lora,miss", compare__full=False
    )
    found = compare(more, progress=False)
    after = Store(whole.output).lines()
    assert {name for name in after if name not in before} == {n for n in after if n.startswith("miss")}
    assert "full" not in [row.method for row in found.rows]


def test_causal_models_are_compared_by_their_loss(llama: Path, prompts: Path, tmp_path: Path) -> None:
    made = build_comparison(
        flags={
            "model": str(llama), "task": "causal-lm", "data.train": str(prompts), "data.test": str(prompts),
            "data.prompt": "question", "data.completion": "answer", "data.max_length": 32, "targets": "all-linear",
            "training.max_steps": 2, "compare.methods": "hra", "compare.budgets": "2k", "compare.seeds": 1,
            "compare.trials": 1, "compare.full": False, "compare.cost_steps": 0, "output": str(tmp_path / "c"),
            "compare.forgetting": {"test": str(prompts), "text": "question"},
        }
    )  # fmt: skip
    found = compare(made, progress=False)
    assert (found.metric, found.higher_is_better) == ("loss", False)
    rows = {row.method: row for row in found.rows}
    assert rows["hra"].half_width is None
    assert rows["hra"].mean < rows["frozen"].mean
    assert rows["hra"].forgetting["perplexity"].mean != found.forgetting["perplexity"].base
    assert found.forgetting["perplexity"].higher_is_better is False


def test_causal_models_are_compared_by_the_answers_that_are_right(llama: Path, prompts: Path, tmp_path: Path) -> None:
    made = build_comparison(
        flags={
            "model": str(llama), "task": "causal-lm", "data.train": str(prompts), "data.validation": str(prompts),
            "data.test": str(prompts), "data.prompt": "question", "data.completion": "answer", "data.max_length": 32,
            "data.max_eval_rows": 4, "targets": "all-linear", "training.max_steps": 2, "metric": "exact_match",
            "training.eval_strategy": "no", "compare.methods": "lora", "compare.budgets": "2k", "compare.seeds": 1,
            "compare.trials": 2, "compare.full": False, "compare.frozen": False, "compare.cost_steps": 0,
            "output": str(tmp_path / "c"),
        }
    )  # fmt: skip
    found = compare(made, progress=False)
    assert (found.metric, found.higher_is_better) == ("exact_match", True)
    trials = [line.metrics for line in Store(tmp_path / "c").lines().values() if line.kind == "trial"]
    assert len(trials) == 2
    assert all(0 <= trial["validation_exact_match"] <= 1 for trial in trials)


def test_a_method_that_does_not_fit_is_refused_before_anything_is_written(
    bert: Path, rows: Path, tmp_path: Path
) -> None:
    made = recipe(bert, rows, tmp_path / "c", compare__methods="hra,bat", targets=["word_embeddings"])
    with pytest.raises(IsotuneError, match=r"compare\.methods: bat cannot adapt 'bert\.embeddings"):
        compare(made, progress=False)
    assert not (tmp_path / "c").exists()


def test_a_run_that_failed_is_final_until_it_is_retried(
    bert: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"compare__methods": "hra", "compare__full": False, "compare__frozen": False, "compare__cost_steps": 0}
    made = recipe(bert, rows, tmp_path / "c", **few, compare__trials=1, compare__seeds=1)

    def diverged(*_: Any, **__: Any) -> Any:
        raise DivergedError("the training loss is nan at step 1")

    with monkeypatch.context() as patched:
        patched.setattr(one_run, "train", diverged)
        found = compare(made, progress=False)
    assert (found.units.failed, found.rows) == (1, [])
    assert found.without_result == ["hra at 300: diverged at every learning rate"]
    assert compare(made, progress=False).units.failed == 1
    again = compare(made, retry=True, progress=False)
    assert again.units == Units(planned=2, done=2, failed=0)
