"""The demonstration: all-MiniLM-L6-v2 learns what a citation is for (SciCite), by a probe, by HRA and by LoRA."""

from __future__ import annotations

import copy
import importlib.resources
import importlib.util
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from isotune.checkpoint.base import MINILM
from isotune.checkpoint.export import export_lora
from isotune.checkpoint.load import load
from isotune.training.export import base_of
from isotune.training.folder import RunFolder
from isotune.training.pretrained import frozen_probe
from isotune.training.progress import Screen, quiet_libraries
from isotune.training.recipe import Recipe, build_recipe
from isotune.training.run import Result, train
from isotune.training.session import Session, TaskSpec
from isotune.training.tasks.collator import Example

METHODS: dict[str, dict[str, Any]] = {"hra": {"name": "hra", "rank": 8}, "lora": {"name": "lora", "rank": 4}}
"""HRA of rank 8 and LoRA of rank 4 train the same number of parameters in a square layer."""

DEMO = {"data.max_train_rows": 4000}
"""What the demonstration takes of the 7320 training rows."""

QUICK = {"data.max_train_rows": 640, "data.max_eval_rows": 200}
"""What it takes with `quick`."""


@dataclass(frozen=True)
class DemoRow:
    """One line of the demonstration's table."""

    method: str
    test_accuracy: float
    test_macro_f1: float
    trainable_parameters_encoder: int
    seconds_per_step: float | None
    peak_memory_bytes: int | None


@dataclass(frozen=True)
class Served:
    """An adapter, its export as a LoRA, and what each says when it is loaded into a fresh model."""

    adapter: Path
    exported: Path
    residual: float
    """Largest residual of the exported LoRA over the layers."""
    asked: int
    agree: dict[str, int]
    """For each way of loading it: how often it said what the trained model did, of the times `asked`."""


@dataclass(frozen=True)
class Demo:
    """What the demonstration found."""

    rows: list[DemoRow]
    served: Served
    """HRA's adapter; its predictions are of the labels of the test rows."""


def run_demo(output: str | Path, quick: bool = False, progress: bool = True) -> Demo:
    """Probe, HRA and LoRA on SciCite; then HRA's adapter and its exported LoRA, each loaded into a fresh model.

    Args:
        output: Folder for the runs; an earlier demonstration there is replaced.
        quick: A part of the rows and steps: under a minute, and worse results.
        progress: Whether to show anything on standard error.

    Raises:
        IsotuneError: The demo's package is missing, or the folder holds something else or cannot be written.
    """
    quiet_libraries()
    screen, output, rows = Screen(progress), Path(output), QUICK if quick else DEMO
    recipes = checked_recipes(output, lambda folder: {**settings(folder, rows), "training.learning_rate": 3e-3})
    screen.say("1. a linear probe on the frozen model: a strong baseline, and the start of both heads")
    frozen = frozen_probe(recipes["hra"], screen)
    session, test = frozen.session, frozen.examples["test"]

    def run(name: str) -> tuple[DemoRow, list[Any]]:
        """Train, and forget the model: it would count as the next run's memory."""
        screen.say(f"{2 + list(recipes).index(name)}. {name}, rank {METHODS[name]['rank']}")
        result = train(recipes[name], overwrite=True, progress=progress, probe=frozen.probe, baselines=False)
        return _row(name, result), _predict(with_model(session, result.model), test, screen)

    (hra, trained), (lora, _) = run("hra"), run("lora")
    screen.say("4. the HRA adapter and its export as a LoRA, each loaded into a fresh model")
    served = served_from(recipes["hra"], session.spec, trained, lambda fresh: _predict(fresh, test, screen))
    return Demo([_probe_row(frozen.metrics), hra, lora], served)


def checked_recipes(output: Path, fields: Callable[[Path], dict[str, Any]]) -> dict[str, Recipe]:
    """The recipe of each method, in a folder of its own; raises IsotuneError where one holds something else."""
    recipes = {name: build_recipe(flags={**fields(output / name), "method": own}) for name, own in METHODS.items()}
    for recipe in recipes.values():
        RunFolder(recipe.output).check(resume=False, overwrite=True)
    return recipes


def served_from(
    recipe: Recipe, spec: TaskSpec, trained: Sequence[Any], ask: Callable[[Session], list[Any]]
) -> Served:
    """Export the adapter of a finished run as a LoRA beside it, and ask both in fresh models what `trained` has."""
    adapter = RunFolder(recipe.output).adapter
    exported = Path(f"{recipe.output}-as-lora")
    export = export_lora(adapter, exported, base=base_of(adapter))

    def loaded(folder: Path) -> list[Any]:
        fresh = Session(spec)
        return ask(with_model(fresh, load(fresh.model, folder)))

    said = {
        "the model that was trained": list(trained),
        f"the saved {recipe.method['name'].upper()} adapter": loaded(adapter),
        "the exported LoRA, in isotune": loaded(exported),
    }
    if importlib.util.find_spec("peft"):
        import peft

        fresh = Session(spec)
        said["the exported LoRA, in PEFT"] = ask(
            with_model(fresh, peft.PeftModel.from_pretrained(fresh.model, str(exported)))
        )
    agree = {how: sum(map(operator.eq, found, trained)) for how, found in said.items()}
    return Served(adapter, exported, export.residual, len(trained), agree)


def with_model(session: Session, model: Any) -> Session:
    """The session with another model of its kind."""
    other = copy.copy(session)
    other.model = model
    return other


def settings(output: Path, rows: Mapping[str, int]) -> dict[str, Any]:
    """The fields of a recipe for SciCite; `rows` limits the rows taken, as `DEMO` and `QUICK` do."""
    data = importlib.resources.files("isotune.training") / "scicite"
    return {
        "model": MINILM,
        "data.train": str(data / "train.jsonl.gz"),
        "data.validation": str(data / "validation.jsonl.gz"),
        "data.test": str(data / "test.jsonl.gz"),
        "data.max_length": 64,
        "targets": "query-value",
        "head": "probe",
        "pooling": "mean",  # as the sentence model was trained
        "training.num_train_epochs": 1,
        "training.per_device_train_batch_size": 32,
        "output": str(output),
        **rows,
    }


@torch.no_grad()
def _predict(session: Session, examples: list[Example], screen: Screen) -> list[int]:
    """The predicted label of each example."""
    session.model.eval()
    found: list[int] = []
    with screen.counting("predictions", len(examples)) as advance:
        for start in range(0, len(examples), 64):
            batch = session.collator(examples[start : start + 64])
            logits = session.model(batch["input_ids"], batch["attention_mask"]).logits
            found += logits.argmax(-1).tolist()
            advance(len(logits))
    return found


def _probe_row(measured: dict[str, float]) -> DemoRow:
    return DemoRow("linear probe", measured["test_accuracy"], measured["test_macro_f1"], 0, None, None)


def _row(name: str, result: Result) -> DemoRow:
    m = result.metrics
    return DemoRow(
        f"{name}, rank {METHODS[name]['rank']}",
        m["test_accuracy"],
        m["test_macro_f1"],
        m["trainable_parameters_encoder"],
        m["seconds_per_step"],
        m["peak_memory_bytes"],
    )
