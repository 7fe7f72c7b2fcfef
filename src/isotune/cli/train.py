"""`isotune train` and `isotune evaluate`: flags in, metrics out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isotune.cli.output import print_table
from isotune.cli.report import write_beside
from isotune.errors import OptionError

if TYPE_CHECKING:
    from isotune.training.tasks.by_label import ByLabel

Flag = typer.Option
_MOST_LABELS = 20
"""That are shown one by one; --json has them all."""

_TRAIN_HELP = """Train an adapter from a recipe, from flags, or from a recipe with flags over it.

Everything goes into the output folder: the resolved recipe, checkpoints, the adapter, metrics.json, history.json, and
with isotune[report] installed a page to read, report.html. Method full trains the whole model in place of an adapter,
and leaves it in the folder `model`.

Examples:

  isotune train recipe.yaml --set method.rank=16

  isotune train --model minilm --data train.csv --test test.csv --text sentence --label intent --output runs/one

  isotune train --model ./llama --task causal-lm --data chats.jsonl --prompt question --completion answer
  --targets all-linear --output runs/two

  isotune train runs/one/recipe.yaml --resume

Ctrl-C saves a checkpoint; a recipe's training section takes every field of transformers.TrainingArguments,
for example --set training.num_train_epochs=1 --set training.report_to=tensorboard.

On several processes: torchrun --nproc-per-node 2 -m isotune.cli train recipe.yaml
"""

_EVALUATE_HELP = """Evaluate a run, or an adapter or model that isotune wrote, on rows that have answers.

Rows without them: isotune predict. Without --data the run's own test rows are used (else its validation rows).

Examples:

  isotune evaluate runs/one

  isotune evaluate runs/one --data labelled.csv --predictions told.csv

  isotune evaluate ./adapter --model ./base --data new.csv --json

  isotune evaluate runs/one --data questions.jsonl --generate 256 --match number --predictions answers.jsonl

  isotune evaluate smollm2 --task causal-lm --data questions.jsonl

  isotune evaluate runs/one --forgetting other-task.csv --forgetting-text question --forgetting-label topic

--generate lets a language model answer each prompt and counts the answers that are right. With --task, what no run of
isotune's made is evaluated, too: a LoRA, a merged model, a pretrained one by its name.

The last one shows what the model has forgotten: a linear probe on another task's rows, three tenths of them held out,
with the features of the pretrained and of the trained model; of language models, the perplexity on a text, or of an
encoder-decoder that of another task's completions (--forgetting-prompt, --forgetting-completion).
"""


def train_command(
    recipe: Annotated[Path | None, typer.Argument(help="Recipe file (YAML).", show_default=False)] = None,
    sets: Annotated[
        list[str] | None, Flag("--set", help="key=value over the recipe, as YAML: --set method.rank=16.")
    ] = None,
    model: Annotated[str | None, Flag(help="Folder or hub id of the pretrained model; minilm.")] = None,
    task: Annotated[
        str | None,
        Flag(
            help="classification, regression, token-classification, image-classification, audio-classification, "
            "causal-lm, seq2seq-lm or preference."
        ),
    ] = None,
    data: Annotated[str | None, Flag(help="Training rows: file, folder, or hub id.")] = None,
    test: Annotated[
        str | None, Flag(help="Test rows: file, a split of the data, or a share to hold out (0.2).")
    ] = None,
    text: Annotated[list[str] | None, Flag(help="Column with the text; given twice, a pair of texts.")] = None,
    label: Annotated[str | None, Flag(help="Column with the label, number or tags.")] = None,
    prompt: Annotated[str | None, Flag(help="Column with the prompt (causal-lm).")] = None,
    completion: Annotated[str | None, Flag(help="Column with the completion (causal-lm).")] = None,
    messages: Annotated[str | None, Flag(help="Column with chats (causal-lm).")] = None,
    method: Annotated[str | None, Flag(help="Method; see isotune methods. Or full: no adapter.")] = None,
    rank: Annotated[int | None, Flag(help="The method's rank.")] = None,
    targets: Annotated[
        str | None,
        Flag(help="A preset, such as attention, mlp, all-linear, norms or blocks; or a regular expression."),
    ] = None,
    metric: Annotated[str | None, Flag(help="What the run is judged by; by default the task's first.")] = None,
    output: Annotated[str | None, Flag(help="Folder for the run.")] = None,
    seed: Annotated[int | None, Flag(help="Seed of everything random.")] = None,
    resume: Annotated[bool, Flag("--resume", help="Continue the run in the output folder.")] = False,
    overwrite: Annotated[bool, Flag("--overwrite", help="Replace the run in the output folder.")] = False,
    report: Annotated[bool, Flag("--report/--no-report", help="Write report.html into the output folder.")] = True,
    as_json: Annotated[bool, Flag("--json", help="Only the metrics, as JSON, on standard output.")] = False,
) -> None:
    from isotune.training.recipe import build_recipe

    flags = {
        "model": model, "task": task, "data.train": data, "data.test": test, "data.text": _one_or_more(text),
        "data.label": label, "data.prompt": prompt, "data.completion": completion, "data.messages": messages,
        "method.name": method, "method.rank": rank, "targets": targets, "metric": metric, "output": output,
        "seed": seed,
    }  # fmt: skip
    built = build_recipe(recipe, flags, sets or ())
    from isotune.training.run import train

    try:
        result = train(built, resume=resume, overwrite=overwrite)
    except KeyboardInterrupt as stopped:
        print(f"\nisotune: {stopped or 'stopped at once'}", file=sys.stderr)
        raise typer.Exit(130) from None
    from isotune.training.progress import is_first_process

    if is_first_process():
        write_beside(result.output, report)
    _show(result.metrics, as_json, f"{result.output}: finished. Trained: {result.trained}")


def evaluate_command(
    path: Annotated[
        Path, typer.Argument(metavar="RUN_OR_FOLDER", help="A run, an adapter, or a model trained in full or merged.")
    ],
    data: Annotated[str | None, Flag(help="Rows to evaluate on.")] = None,
    model: Annotated[str | None, Flag(help="The pretrained model, if it has moved.")] = None,
    text: Annotated[list[str] | None, Flag(help="Column with the text; given twice, a pair of texts.")] = None,
    label: Annotated[str | None, Flag(help="Column with the label, number or tags.")] = None,
    prompt: Annotated[str | None, Flag(help="Column with the prompt.")] = None,
    completion: Annotated[str | None, Flag(help="Column with the completion.")] = None,
    messages: Annotated[str | None, Flag(help="Column with chats.")] = None,
    predictions: Annotated[Path | None, Flag(help="Write predictions here (.csv or .jsonl).")] = None,
    batch_size: Annotated[
        int | None, Flag(min=1, help="Rows at a time; by default 64, of language models 8.")
    ] = None,
    force: Annotated[bool, Flag("--force", help="Accept a base model unlike the adapter's own.")] = False,
    task: Annotated[str | None, Flag(help="What the model is for, if it does not say so itself.")] = None,
    generate: Annotated[
        int | None, Flag(min=1, help="Let a language model answer the prompts, in so many tokens at most.")
    ] = None,
    match: Annotated[str, Flag(help="What of an answer has to be right: text, or the last number in it.")] = "text",
    forgetting: Annotated[
        str | None, Flag(help="Rows of another task (causal-lm: general text) to measure before and after.")
    ] = None,
    forgetting_text: Annotated[str | None, Flag(help="Their column with the text.")] = None,
    forgetting_label: Annotated[str | None, Flag(help="Their column with the label.")] = None,
    forgetting_prompt: Annotated[str | None, Flag(help="Their column with the prompt (seq2seq-lm).")] = None,
    forgetting_completion: Annotated[str | None, Flag(help="Their column with the completion.")] = None,
    as_json: Annotated[bool, Flag("--json", help="Only the metrics, as JSON, on standard output.")] = False,
) -> None:
    from isotune.training.evaluation import evaluate
    from isotune.training.forgetting import settings_for
    from isotune.training.opening import find_trained
    from isotune.training.session import TaskSpec

    named = {
        "text": _one_or_more(text),
        "label": label,
        "prompt": prompt,
        "completion": completion,
        "messages": messages,
    }
    columns: dict[str, Any] = {key: name for key, name in named.items() if name is not None}
    if match not in ("text", "number"):
        raise OptionError(f"--match {match!r} is unknown; choose text or number")
    kind: Any = match
    rows = None
    if forgetting is not None:
        trained_for = task or TaskSpec.read(find_trained(path)[0]).task
        rows = settings_for(
            trained_for, forgetting, text=forgetting_text, label=forgetting_label, prompt=forgetting_prompt,
            completion=forgetting_completion,
        )  # fmt: skip
    metrics = evaluate(
        path, data, model=model, columns=columns, predictions=predictions, batch_size=batch_size, force=force,
        forgetting=rows, task=task, generate=generate, match=kind,
    )  # fmt: skip
    _show(metrics, as_json, "")


def _one_or_more(names: list[str] | None) -> str | list[str] | None:
    return names[0] if names and len(names) == 1 else names or None


def _show(metrics: dict[str, Any], as_json: bool, closing: str) -> None:
    """The result on standard output, from the first process only."""
    from isotune.training.progress import is_first_process

    if not is_first_process():
        return
    if as_json:
        print(json.dumps(metrics))
        return
    for name, value in metrics.items():
        if not isinstance(value, dict):
            print(f"{name:30} {_figure(value)}")
    if 0 < len(metrics.get("labels", ())) <= _MOST_LABELS:
        _show_labels(metrics["labels"])
    if closing:
        print(closing, file=sys.stderr)


def _figure(value: Any) -> str:
    """A number, an interval's two ends, or whatever else there is."""
    if isinstance(value, list):
        return " to ".join(map(_figure, value))
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _show_labels(found: ByLabel) -> None:
    """A line for each label, as a table on standard output."""
    from isotune.training.tasks.by_label import confused_with

    print_table(
        "Each label",
        ["label", "support", "precision", "recall", "F1", "taken for"],
        [
            [
                label,
                str(scores["support"]),
                *(f"{scores[name]:.4f}" for name in ("precision", "recall", "f1")),
                confused_with(label, scores),
            ]
            for label, scores in found.items()
        ],
    )


def register(app: typer.Typer) -> None:
    """Add the two commands to the application."""
    app.command("train", help=_TRAIN_HELP)(train_command)
    app.command("evaluate", help=_EVALUATE_HELP)(evaluate_command)
