"""`isotune predict`: what a trained model says of rows that nobody has answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

Flag = typer.Option

_HELP = """Write what a run, an adapter or a model says of the rows in a file, a line each, in their order.

A line is the row and its `prediction`: a label with its `probability`, a number, a tag for each word with the
`entities` that they make, or the text that a language model writes after a prompt or as the next turn of a chat. Rows
need no labels. Of folders of images or sounds a line has the file's name.

Rows are read, answered and written some at a time. The output, .jsonl or .csv, is there once it is complete; without
--output the lines go to standard output as they come. To measure rows that have labels: isotune evaluate.

Examples:

  isotune predict runs/one new.csv --output told.csv

  isotune predict runs/one new.jsonl --text review --probabilities --output told.jsonl

  isotune predict runs/pictures path/to/images --output told.csv

  isotune predict runs/answers questions.jsonl --prompt question --max-new-tokens 64 | head

  isotune predict smollm2 chats.jsonl --task causal-lm --output answers.jsonl
"""


def predict_command(
    path: Annotated[
        Path, typer.Argument(metavar="RUN_OR_MODEL", help="A run, an adapter, or a model trained in full or merged.")
    ],
    data: Annotated[str, typer.Argument(metavar="DATA", help="Rows: a file, a folder, or a data set of the hub.")],
    output: Annotated[Path | None, Flag(help="A .jsonl or .csv file; by default standard output.")] = None,
    model: Annotated[str | None, Flag(help="The pretrained model, if it has moved.")] = None,
    text: Annotated[list[str] | None, Flag(help="Column with the text; given twice, a pair of texts.")] = None,
    prompt: Annotated[str | None, Flag(help="Column with the prompt.")] = None,
    messages: Annotated[str | None, Flag(help="Column with chats.")] = None,
    image: Annotated[str | None, Flag(help="Column with the image.")] = None,
    audio: Annotated[str | None, Flag(help="Column with the sound.")] = None,
    task: Annotated[str | None, Flag(help="What the model is for, if it does not say so itself.")] = None,
    batch_size: Annotated[
        int | None, Flag(min=1, help="Rows at a time; by default 64, of language models 8, of sound 16.")
    ] = None,
    max_new_tokens: Annotated[int, Flag(min=1, help="The longest text that is written, in tokens.")] = 256,
    probabilities: Annotated[bool, Flag("--probabilities", help="Those of all labels, too (.jsonl).")] = False,
    force: Annotated[bool, Flag("--force", help="Accept a base model unlike the adapter's own.")] = False,
    as_json: Annotated[bool, Flag("--json", help="With --output, how many rows there were, as JSON.")] = False,
) -> None:
    from isotune.training.prediction import predict
    from isotune.training.progress import is_first_process

    named: dict[str, Any] = {
        "text": text[0] if text and len(text) == 1 else text, "prompt": prompt, "messages": messages,
        "image": image, "audio": audio,
    }  # fmt: skip
    rows = predict(
        path, data, output, model=model, columns={key: name for key, name in named.items() if name}, task=task,
        batch_size=batch_size, max_new_tokens=max_new_tokens, probabilities=probabilities, force=force,
    )  # fmt: skip
    if as_json and output is not None and is_first_process():
        print(json.dumps({"rows": rows, "output": str(output)}))


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("predict", help=_HELP)(predict_command)
