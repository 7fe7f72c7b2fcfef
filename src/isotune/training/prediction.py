"""What a trained model says of rows that nobody has answered: read, answered and written some at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from isotune.errors import OptionError
from isotune.training.data import Row, unanswered_rows
from isotune.training.evaluation import measuring
from isotune.training.generation import generate, prompts_and_answers
from isotune.training.lines import Line, check_output, writing_lines
from isotune.training.opening import found_model, open_found, settings_of
from isotune.training.progress import Screen, quiet_libraries
from isotune.training.session import Session
from isotune.training.tasks.names import TASKS
from isotune.training.trainer import AdapterTrainer

BATCHES = 16
"""That are read, answered and written together: rows of one length can share a batch."""


def predict(
    path: str | Path,
    data: str,
    output: str | Path | None = None,
    *,
    model: str | None = None,
    columns: dict[str, Any] | None = None,
    task: str | None = None,
    batch_size: int | None = None,
    max_new_tokens: int = 256,
    probabilities: bool = False,
    force: bool = False,
    progress: bool = True,
) -> int:
    """Write what a model says of rows, which may have answers or not, a line each, in their order.

    A line is the row with its `prediction`: a label and its `probability`, a number, a tag for each word (and the
    `entities` that they make), or the text that a language model writes. Of images and sounds the row has the file.

    Args:
        path: As for `evaluate`: a run, an adapter, a model; with `task` any other model.
        data: A file, a folder or a data set.
        output: A .jsonl or .csv file, which is there only once it is complete; by default JSON lines go to standard
            output as they come.
        model: An adapter's pretrained model, where it is not what the adapter was trained on by name.
        columns: Column names (`text`, `prompt`, ...) where they differ from the run's.
        task: What the model is for, where it does not say so itself.
        batch_size: Rows at a time; by default the task's own number.
        max_new_tokens: The longest text that is written.
        probabilities: Add those of all labels to each line.
        force: Use the adapter on a base model that does not look like its own.
        progress: Whether to show anything on standard error.

    Returns:
        How many rows there were.

    Raises:
        IsotuneError: The model or the data cannot be used, or the file not be written; it is then not there.
    """
    quiet_libraries()
    screen = Screen(progress)
    file = None if output is None else Path(output)
    if file is not None:
        check_output(file)
    if probabilities and file is not None and file.suffix == ".csv":
        raise OptionError("the probabilities of all labels have no column of their own; write them to a .jsonl file")
    trained, recipe, spec = found_model(path, task, model)
    size = batch_size or TASKS[spec.task].rows_at_a_time
    count, chunks = unanswered_rows(data, settings_of(data, recipe, columns or {}), spec.task, BATCHES * size)
    session = open_found(trained, spec, model, force)
    if probabilities and not session.task.probable:
        raise OptionError(f"a {spec.task} model has no labels with probabilities; leave them out")
    with (
        measuring(session, size) as trainer,
        writing_lines(file) as write,
        screen.counting("predicting", count) as advance,
    ):
        trainer.compute_metrics = None
        for rows in chunks:
            if session.task.writes:
                write(_written(session, rows, max_new_tokens, size, advance))
            else:
                write(_told(session, trainer, rows, probabilities))
                advance(len(rows))
    if file is not None:
        screen.say(f"predictions of {count} rows written to {file}")
    return count


def _told(session: Session, trainer: AdapterTrainer, rows: list[Row], probabilities: bool) -> list[Line]:
    """The rows with what is read off the model's scores."""
    task, spec = session.task, session.spec
    examples = session.examples(rows)
    order = sorted(range(len(rows)), key=lambda place: len(examples[place].get("input_ids", ())))
    scores = np.asarray(trainer.predict([examples[place] for place in order]).predictions)[np.argsort(order)]
    lines = task.predicted(rows, scores, spec)
    if not probabilities:
        return lines
    return [{**line, "probabilities": own} for line, own in zip(lines, task.probabilities(scores, spec), strict=True)]


def _written(
    session: Session, rows: list[Row], longest: int, size: int, advance: Callable[[int], None]
) -> list[Line]:
    """The rows with what the model writes: after a prompt, or as the next, or a better last, turn of a chat."""
    empty = {"role": "assistant", "content": ""}
    asked = [{**row, "messages": [*row["messages"], empty]} if _waits(row) else row for row in rows]
    prompts, _ = prompts_and_answers(asked, session)
    answers = generate(session, prompts, longest, size, advance)
    return [{**row, "prediction": answer} for row, answer in zip(rows, answers, strict=True)]


def _waits(row: Row) -> bool:
    """Whether the row is a chat in which it is the assistant's turn."""
    return "messages" in row and row["messages"][-1]["role"] != "assistant"
