"""Measure a model on rows, and write down what it predicts: what a run trained, or any other."""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from isotune.checkpoint.files import read_adapter, write_atomically
from isotune.checkpoint.read import holds_adapter
from isotune.errors import DataError, IsotuneError
from isotune.folders import TASK
from isotune.intervals import wilson
from isotune.training.arguments import machine_arguments
from isotune.training.data import Row, load_rows, load_splits
from isotune.training.folder import RunFolder, trained_folder
from isotune.training.forgetting import Forgetting, ForgettingSettings
from isotune.training.generation import Match, exact_match, prompts_and_answers
from isotune.training.generation import generate as generate_texts
from isotune.training.model_folder import open_trained
from isotune.training.progress import Screen, is_first_process, quiet_libraries
from isotune.training.recipe import DataSettings, Recipe
from isotune.training.session import Session, TaskSpec
from isotune.training.tasks.collator import Example
from isotune.training.tasks.names import TASKS

_NO_CHANGES: dict[str, Any] = {}


def evaluate(
    path: str | Path,
    data: str | None = None,
    *,
    model: str | None = None,
    columns: dict[str, Any] | None = None,
    predictions: str | Path | None = None,
    batch_size: int | None = None,
    force: bool = False,
    forgetting: ForgettingSettings | None = None,
    task: str | None = None,
    generate: int | None = None,
    match: Match = "text",
    progress: bool = True,
) -> dict[str, Any]:
    """Evaluate what a run trained, its adapter or with `method: full` its model, or any other model.

    Args:
        path: A run's folder, or its adapter's or model's folder, wherever that is now, or a merged export; with
            `task` also what no run made: a LoRA, a merged model, a pretrained model by its name.
        data: Rows to evaluate on; by default the run's test rows, else its validation rows.
        model: An adapter's pretrained model, where it is not what the adapter was trained on by name.
        columns: Column names (`text`, `label`, `prompt`, `completion`) where they differ from the run's.
        predictions: A .csv or .jsonl file to write one line a row to; the rows may then lack what is to be predicted.
        batch_size: Rows at a time; by default 64, of language models 8, whose logits are large.
        force: Use the adapter on a base model that does not look like its own.
        forgetting: Other rows, on which the pretrained model is measured before and after, too.
        task: What the model is for, where it does not say so itself.
        generate: Let a language model answer each prompt, in so many tokens at most; `exact_match` is then measured,
            and the answers are the predictions.
        match: What of an answer has to be right: all of its "text", or the last "number" in it.
        progress: Whether to show anything on standard error.

    Returns:
        Metrics with flat keys, such as `accuracy`, `macro_f1`, `loss`, `perplexity`, and `rows`; of rows that lack
        what is to be predicted `rows` alone; `accuracy_interval`, the ends of its 95 % interval over other rows, and
        `labels`, what was measured of each label (`ByLabel`); of forgetting, `forgetting_probe_accuracy` (after) and
        `forgetting_base_probe_accuracy` (before), and so on.

    Raises:
        IsotuneError: The adapter, the model or the data cannot be used.
    """
    quiet_libraries()
    screen = Screen(progress)
    trained, recipe, spec = _found(path, task, model)
    batch_size = batch_size or TASKS[spec.task].rows_at_a_time
    if predictions is not None:
        _check_predictions(Path(predictions))
    rows = rows_for(
        data, spec, recipe, columns or _NO_CHANGES, ("test", "validation"), unanswered=predictions is not None
    )
    TASKS[spec.task].check(rows, spec.labels, "the data")
    held_out = None
    if forgetting is not None:
        screen.say("measuring the pretrained model on the rows of forgetting")
        held_out = Forgetting(forgetting, replace(spec, model=model or spec.model))
    session = _open(trained, spec, model, force)
    metrics: dict[str, Any] = {}
    lines: list[dict[str, Any]] = []
    if generate is not None:
        metrics, lines = _generated(session, rows, generate, match, batch_size, screen)
    if _answered(rows, spec):
        examples = session.examples(rows)
        screen.say(f"evaluating {trained or path} on {len(examples)} examples")
        with screen.console.status("evaluating"):
            found, scores = measured(session, examples, batch_size)
        found |= session.task.intervals(found, len(examples))
        metrics = {**found, **metrics, **({"labels": session.by_label} if session.by_label else {})}
        if predictions is not None and not lines:
            lines = _predicted(rows, scores, session.spec)
    elif generate is None:
        raise DataError("the rows have prompts, and no answers to measure; let them be answered: --generate 256")
    if predictions is not None and is_first_process():
        write_atomically(Path(predictions), _table(lines, Path(predictions).suffix))
        screen.say(f"predictions written to {predictions}")
    found = {**metrics, "rows": len(rows)}
    if held_out is not None:
        screen.say("measuring the trained model on the rows of forgetting")
        found |= {f"forgetting_{name}": value for name, value in held_out.measure(session.model).items()}
        found |= {f"forgetting_base_{name}": value for name, value in held_out.base.items()}
    return found


def _generated(
    session: Session, rows: list[Row], most: int, match: Match, batch_size: int, screen: Screen
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the answers are worth, where the rows have answers of their own, and each row with the model's."""
    prompts, wanted = prompts_and_answers(rows, session)
    with screen.counting("answering", len(rows)) as advance:
        answers = generate_texts(session, prompts, most, batch_size, advance)
    metrics: dict[str, Any] = {}
    if wanted is not None:
        share = exact_match(answers, wanted, match)
        metrics = {"exact_match": share, "exact_match_interval": list(wilson(share, len(rows)))}
    return metrics, [{**row, "prediction": answer} for row, answer in zip(rows, answers, strict=True)]


def open_any(path: str | Path, task: str, model: str | None = None, force: bool = False) -> Session:
    """The model that a run trained, or any other: an adapter on its base, a model's folder, a model by its name.

    Raises IsotuneError as `evaluate` does.
    """
    trained, _, spec = _found(path, task, model)
    return _open(trained, spec, model, force)


def _found(path: str | Path, task: str | None, model: str | None) -> tuple[Path | None, Recipe | None, TaskSpec]:
    """The folder of what was trained (None for a pretrained model), its run's recipe, and what it is for."""
    folder = Path(path)
    if folder.is_dir():
        trained, recipe = find_trained(folder)
        if (trained / TASK).is_file() or task is None:
            return trained, recipe, TaskSpec.read(trained)
        if holds_adapter(trained):
            base = model or read_adapter(trained)[0].get("base_model_name_or_path")
            if not base:
                raise IsotuneError(f"{trained} does not say what it is an adapter of; name the model with --model")
            return trained, recipe, TaskSpec.plain(task, base)
        return None, recipe, TaskSpec.plain(task, str(trained))
    if task is None:
        raise IsotuneError(
            f"no run or adapter folder at {path}; a pretrained model is evaluated with --task, such as causal-lm"
        )
    if model is not None:
        raise IsotuneError(f"no adapter at {path}, which would be one of --model {model}")
    return None, None, TaskSpec.plain(task, str(path))


def _open(trained: Path | None, spec: TaskSpec, model: str | None, force: bool) -> Session:
    return Session(spec) if trained is None else open_trained(trained, model, force, spec)


def _answered(rows: Sequence[Row], spec: TaskSpec) -> bool:
    """Whether the rows have what is to be predicted."""
    return "prompt" not in rows[0] or TASKS[spec.task].answer in rows[0]


def measured(
    session: Session, examples: Sequence[Example], batch_size: int = 64
) -> tuple[dict[str, Any], np.ndarray]:
    """The metrics of the session's model on examples, by flat keys, and what it predicts for each of them."""
    with tempfile.TemporaryDirectory(prefix="isotune-") as scratch:
        arguments = transformers.TrainingArguments(
            output_dir=scratch,
            per_device_eval_batch_size=batch_size,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            **machine_arguments(),
        )
        output = session.trainer(arguments).predict(list(examples), metric_key_prefix="test")
    metrics = session.task.of_trainer(output.metrics, "test")
    return {name.removeprefix("test_"): value for name, value in metrics.items()}, np.asarray(output.predictions)


def find_trained(path: Path) -> tuple[Path, Recipe | None]:
    """The folder of an adapter or of a trained model, and the recipe of the run it belongs to, where there is one."""
    if not path.is_dir():
        raise IsotuneError(f"no run or adapter folder at {path}")
    run = RunFolder(path)
    if run.is_run():
        return trained_folder(path), run.recipe()
    around = RunFolder(path.absolute().parent)
    return path, around.recipe() if around.is_run() else None


def rows_for(
    data: str | None,
    spec: TaskSpec,
    recipe: Recipe | None,
    columns: dict[str, Any],
    splits: Sequence[str],
    unanswered: bool = False,
) -> list[Row]:
    """The rows of `data`, which may be `unanswered`, or else of the first of the run's splits that has some."""
    if data is None:
        if recipe is None:
            raise IsotuneError("the adapter's run is not at hand: say which rows to take, with --data FILE")
        settings = DataSettings(**{**recipe.data.model_dump(), **columns})
        loaded = load_splits(settings, spec.task, recipe.seed)
        rows = next((found for name in splits if (found := getattr(loaded, name))), None)
        if rows is None:
            raise IsotuneError(f"the run has no {' or '.join(splits)} rows; give some with --data FILE")
        return rows
    known = recipe.data.model_dump() if recipe is not None else {}
    return load_rows(data, DataSettings(**{**known, "train": data, **columns}), spec.task, unanswered)


def _check_predictions(path: Path) -> None:
    if path.suffix not in (".csv", ".jsonl"):
        raise IsotuneError(f"--predictions {path}: name a .csv or a .jsonl file")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise IsotuneError(f"--predictions {path}: no such folder to write it in")


def _predicted(rows: list[Row], scores: np.ndarray, spec: TaskSpec) -> list[dict[str, Any]]:
    """Each row with what the model says of it."""
    if len(rows) != len(scores):
        raise DataError("packed text has no prediction per row; --predictions needs prompts and completions")
    return TASKS[spec.task].predicted(rows, scores, spec)


def _table(lines: list[dict[str, Any]], suffix: str) -> str:
    if suffix == ".jsonl":
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    buffer = StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return buffer.getvalue()
