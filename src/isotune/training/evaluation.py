"""Measure a model on rows, and write down what it predicts: what a run trained, or any other."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import transformers

from isotune.errors import DataError
from isotune.intervals import wilson
from isotune.training.arguments import machine_arguments
from isotune.training.data import Row
from isotune.training.forgetting import Forgetting, ForgettingSettings
from isotune.training.generation import generate as generate_texts
from isotune.training.generation import prompts_and_answers
from isotune.training.lines import check_output, writing_lines
from isotune.training.opening import found_model, open_found, rows_for
from isotune.training.progress import Screen, quiet_libraries
from isotune.training.session import Session, TaskSpec
from isotune.training.tasks.answers import Match, exact_match
from isotune.training.tasks.collator import Example
from isotune.training.tasks.names import TASKS
from isotune.training.trainer import AdapterTrainer

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
        predictions: A .csv or .jsonl file to write one line a row to; see `predict` for rows without answers.
        batch_size: Rows at a time; by default 64, of language models 8, whose logits are large.
        force: Use the adapter on a base model that does not look like its own.
        forgetting: Other rows, on which the pretrained model is measured before and after, too.
        task: What the model is for, where it does not say so itself.
        generate: Let a language model answer each prompt, in so many tokens at most; `exact_match` is then measured,
            and the answers are the predictions.
        match: What of an answer has to be right: all of its "text", or the last "number" in it.
        progress: Whether to show anything on standard error.

    Returns:
        Metrics with flat keys, such as `accuracy`, `macro_f1`, `loss`, `perplexity`, and `rows`; `accuracy_interval`,
        the ends of its 95 % interval over other rows, and `labels`, what was measured of each label (`ByLabel`); of
        forgetting, `forgetting_probe_accuracy` (after) and `forgetting_base_probe_accuracy` (before), and so on.

    Raises:
        IsotuneError: The adapter, the model or the data cannot be used.
    """
    quiet_libraries()
    screen = Screen(progress)
    trained, recipe, spec = found_model(path, task, model)
    batch_size = batch_size or TASKS[spec.task].rows_at_a_time
    if predictions is not None:
        check_output(Path(predictions))
    rows = rows_for(data, spec, recipe, columns or _NO_CHANGES, ("test", "validation"))
    TASKS[spec.task].check(rows, spec.labels, "the data")
    held_out = None
    if forgetting is not None:
        screen.say("measuring the pretrained model on the rows of forgetting")
        held_out = Forgetting(forgetting, replace(spec, model=model or spec.model))
    session = open_found(trained, spec, model, force)
    examples = session.examples(rows)
    screen.say(f"evaluating {trained or path} on {len(examples)} examples")
    with screen.console.status("evaluating"):
        metrics, scores = measured(session, examples, batch_size)
    metrics |= session.task.intervals(metrics, len(examples))
    if session.by_label:
        metrics["labels"] = session.by_label
    lines: list[dict[str, Any]] = []
    if generate is not None:
        more, lines = _generated(session, rows, generate, match, batch_size, screen)
        metrics |= more
    if predictions is not None:
        lines = lines or _predicted(rows, scores, session.spec)
        with writing_lines(Path(predictions)) as write:
            write(lines)
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


def measured(
    session: Session, examples: Sequence[Example], batch_size: int = 64
) -> tuple[dict[str, Any], np.ndarray]:
    """The metrics of the session's model on examples, by flat keys, and what it predicts for each of them."""
    with measuring(session, batch_size) as trainer:
        output = trainer.predict(list(examples), metric_key_prefix="test")
    metrics = session.task.of_trainer(output.metrics, "test")
    return {name.removeprefix("test_"): value for name, value in metrics.items()}, np.asarray(output.predictions)


@contextmanager
def measuring(session: Session, batch_size: int) -> Iterator[AdapterTrainer]:
    """A trainer that trains nothing, and a place for what it wants to write."""
    with tempfile.TemporaryDirectory(prefix="isotune-") as scratch:
        arguments = transformers.TrainingArguments(
            output_dir=scratch,
            per_device_eval_batch_size=batch_size,
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            **machine_arguments(),
        )
        yield session.trainer(arguments)


def _predicted(rows: list[Row], scores: np.ndarray, spec: TaskSpec) -> list[dict[str, Any]]:
    """Each row with what the model says of it."""
    if len(rows) != len(scores):
        raise DataError("packed text has no prediction per row; --predictions needs prompts and completions")
    return TASKS[spec.task].predicted(rows, scores, spec)
