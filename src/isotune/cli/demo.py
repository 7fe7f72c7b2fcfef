"""`isotune demo`: the main job on real data, end to end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from isotune.cli.compare import show
from isotune.cli.output import print_json, print_table

if TYPE_CHECKING:
    from isotune.comparison.recipe import ComparisonRecipe
    from isotune.training.demo import Demo, DemoRow, Served
    from isotune.training.demo_language import LanguageDemo, LanguageRow

Flag = typer.Option

_HELP = """Adapt all-MiniLM-L6-v2 to SciCite: is a citation there for background, a method or a result?

A linear probe first, then HRA, and LoRA with the same number of parameters, both from the probe's head. The HRA
adapter is saved, exported as a LoRA, and both are loaded into fresh models that must predict the same. About five
minutes on two cores; nothing is downloaded.

With --model smollm2 a language model, SmolLM2-135M-Instruct, learns to solve sums in words (GSM8K): its loss as it
comes, with HRA and with LoRA, and what is written with HRA's adapter and with the LoRA exported from it.

With --seeds, a comparison in place of the demonstration, as isotune compare makes it: each method's learning rate is
searched with the same trials, then the best is run with that many other seeds.
"""


class DemoModel(StrEnum):
    """What the demonstration adapts."""

    MINILM = "minilm"
    SMOLLM2 = "smollm2"


def demo_command(
    output: Annotated[Path, Flag(help="Folder for the runs.")] = Path("demo-run"),
    model: Annotated[DemoModel, Flag(help="The encoder, or the language model.")] = DemoModel.MINILM,
    quick: Annotated[bool, Flag("--quick", help="Fewer rows: under a minute, worse results.")] = False,
    seeds: Annotated[int | None, Flag(min=2, max=10, help="Compare HRA and LoRA over this many seeds.")] = None,
    as_json: Annotated[bool, Flag("--json", help="Only the result, as JSON, on standard output.")] = False,
) -> None:
    if seeds is not None:
        from isotune.comparison import run

        found = run.compare(comparison(output, quick, seeds, model))
        print(json.dumps(found.model_dump())) if as_json else show(found)
    elif model is DemoModel.SMOLLM2:
        from isotune.training.demo_language import run_language_demo

        told = run_language_demo(output, quick)
        print_json(told) if as_json else _show_language_demo(told)
    else:
        from isotune.training.demo import run_demo

        demo = run_demo(output, quick)
        print_json(demo) if as_json else _show_demo(demo)


def comparison(output: Path, quick: bool, seeds: int, model: DemoModel = DemoModel.MINILM) -> ComparisonRecipe:
    """HRA and LoRA on SciCite or GSM8K, of one size, each with its own search."""
    from isotune.comparison.recipe import build_comparison
    from isotune.training import demo, demo_language

    chosen = {
        "method": {"name": "hra"},
        "compare.methods": "hra,lora",
        "compare.seeds": seeds,
        "compare.trials": 5,
        "compare.span": [0.3, 10],
        "compare.full": False,
        "compare.cost_steps": 0,
    }
    if model is DemoModel.SMOLLM2:
        of_model = demo_language.language_settings(output, demo_language.QUICK if quick else {})
    else:
        of_model = demo.settings(output, demo.QUICK if quick else {})
    return build_comparison(flags={**of_model, **chosen})


def _show_language_demo(demo: LanguageDemo) -> None:
    _show_rows(
        "GSM8K, solutions of the test problems",
        ["loss", "perplexity", "parameters"],
        {
            row: [f"{row.test_loss:.3f}", f"{row.test_perplexity:.2f}", f"{row.trainable_parameters:,}"]
            for row in demo.rows
        },
    )
    _show_served(demo.served, "problems answered alike, to the letter")
    print(f"\n{demo.problem}")
    for who, answer in demo.answers.items():
        print(f"\n{who}:\n{answer}")
    _show_next(
        demo.served,
        "isotune train --model smollm2 --task causal-lm --data chats.jsonl --test 0.2 --output my-run",
        "isotune chat my-run",
    )


def _show_demo(demo: Demo) -> None:
    _show_rows(
        "SciCite, test rows",
        ["accuracy", "macro-F1", "parameters in the encoder"],
        {
            row: [
                f"{100 * row.test_accuracy:.1f}",
                f"{100 * row.test_macro_f1:.1f}",
                f"{row.trainable_parameters_encoder:,}",
            ]
            for row in demo.rows
        },
    )
    _show_served(demo.served, "the same predictions on test rows")
    _show_next(
        demo.served,
        "isotune train --model minilm --data train.csv --test test.csv --text text --label label --output my-run",
        "isotune predict my-run new.csv --output predictions.csv",
    )


def _show_rows(title: str, columns: list[str], rows: Mapping[DemoRow | LanguageRow, list[str]]) -> None:
    print_table(
        title,
        ["method", *columns, "seconds a step", "peak memory"],
        [
            [
                row.method,
                *cells,
                "-" if row.seconds_per_step is None else f"{row.seconds_per_step:.3f}",
                "-" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 2**20:,.0f} MiB",
            ]
            for row, cells in rows.items()
        ],
    )


def _show_served(served: Served, what: str) -> None:
    print_table(
        f"Loaded into fresh models: {what}",
        ["how", "rows"],
        [[how, f"{count} of {served.asked}"] for how, count in served.agree.items()],
        f"largest residual of the exported LoRA: {served.residual:.1e}",
    )


def _show_next(served: Served, *commands: str) -> None:
    print(f"\nHRA adapter:   {served.adapter}\nexported LoRA: {served.exported}\n\nOn your own data:\n")
    for command in (*commands, "isotune export my-run --to lora --output my-lora"):
        print(f"  {command}")


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("demo", help=_HELP)(demo_command)
