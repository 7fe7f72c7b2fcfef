"""The demonstration on a language model: SmolLM2-135M-Instruct learns to solve sums in words, as GSM8K does."""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isotune.checkpoint.base import SMOLLM2
from isotune.training.data import Row, load_splits
from isotune.training.demo import METHODS, Served, checked_recipes, served_from, with_model
from isotune.training.generation import generate, prompts_and_answers
from isotune.training.progress import Screen, quiet_libraries
from isotune.training.run import Result, train
from isotune.training.session import Session, TaskSpec

DEMO = {"data.max_train_rows": 240}
"""What the demonstration takes of the 240 training problems."""

QUICK = {"data.max_train_rows": 32, "data.max_eval_rows": 8}
"""What it takes with `quick`."""

ASKED, LONGEST = 8, 48
"""So many test problems are answered, in at most so many tokens each."""


@dataclass(frozen=True)
class LanguageRow:
    """One line of the demonstration's table."""

    method: str
    test_loss: float
    """Mean over the tokens of the solutions, in nats."""
    test_perplexity: float
    trainable_parameters: int
    seconds_per_step: float | None
    peak_memory_bytes: int | None


@dataclass(frozen=True)
class LanguageDemo:
    """What the demonstration found."""

    rows: list[LanguageRow]
    served: Served
    """HRA's adapter; it was asked for the solutions of problems, which are alike if they are so to the letter."""
    problem: str
    answers: dict[str, str]
    """What was written for one problem: by GSM8K's authors, the bare model, and the one adapted by HRA."""


def run_language_demo(output: str | Path, quick: bool = False, progress: bool = True) -> LanguageDemo:
    """HRA and LoRA of one size on SmolLM2 and GSM8K; then HRA's adapter and its exported LoRA in fresh models.

    Args:
        output: Folder for the runs; an earlier demonstration there is replaced.
        quick: A part of the problems: under a minute, and worse results.
        progress: Whether to show anything on standard error.

    Raises:
        IsotuneError: The model's package is missing, or the folder holds something else or cannot be written.
    """
    quiet_libraries()
    screen, output, rows = Screen(progress), Path(output), QUICK if quick else DEMO
    recipes = checked_recipes(output, lambda folder: language_settings(folder, rows))
    screen.say("1. the model as it comes: what it makes of the test problems")
    spec = TaskSpec.of(recipes["hra"], [])
    problems = (load_splits(recipes["hra"].data, "causal-lm", seed=0).test or [])[:ASKED]
    before = _answers(Session(spec), problems[:1], screen)

    def run(name: str) -> Result:
        screen.say(f"{2 + list(recipes).index(name)}. {name}, rank {METHODS[name]['rank']}")
        return train(recipes[name], overwrite=True, progress=progress, baselines=name == "hra")

    result = run("hra")
    base, hra = _base_row(result.metrics), _row("hra", result.metrics)
    trained = _answers(with_model(Session(spec), result.model), problems, screen)
    del result  # its model would count as the next run's memory
    lora = _row("lora", run("lora").metrics)
    screen.say("4. the HRA adapter and its export as a LoRA, each loaded into a fresh model")
    served = served_from(recipes["hra"], spec, trained, lambda fresh: _answers(fresh, problems, screen))
    told = {"GSM8K": problems[0]["completion"], "the bare model": before[0], "adapted by HRA": trained[0]}
    return LanguageDemo([base, hra, lora], served, problems[0]["prompt"], told)


def language_settings(output: Path, rows: Mapping[str, int]) -> dict[str, Any]:
    """The fields of a recipe for GSM8K; `rows` limits the problems taken, as `DEMO` and `QUICK` do."""
    data = importlib.resources.files("isotune.training") / "gsm8k"
    return {
        "model": SMOLLM2,
        "task": "causal-lm",
        "data.train": str(data / "train.jsonl.gz"),
        "data.test": str(data / "test.jsonl.gz"),
        "data.prompt": "question",
        "data.completion": "answer",
        "data.max_length": 160,
        "targets": "all-linear",
        "training.num_train_epochs": 1,
        "training.per_device_train_batch_size": 4,
        "output": str(output),
        **rows,
    }


def _answers(session: Session, problems: list[Row], screen: Screen) -> list[str]:
    prompts, _ = prompts_and_answers(problems, session)
    with screen.counting("answers", len(prompts)) as advance:
        return generate(session, prompts, LONGEST, advance=advance)


def _base_row(m: Mapping[str, Any]) -> LanguageRow:
    return LanguageRow("the model as it comes", m["test_base_loss"], m["test_base_perplexity"], 0, None, None)


def _row(name: str, m: Mapping[str, Any]) -> LanguageRow:
    return LanguageRow(
        f"{name}, rank {METHODS[name]['rank']}",
        m["test_loss"],
        m["test_perplexity"],
        m["trainable_parameters"],
        m["seconds_per_step"],
        m["peak_memory_bytes"],
    )
