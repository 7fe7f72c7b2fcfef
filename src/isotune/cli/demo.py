"""`isotune demo`: the main job on real data, end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from isotune.cli.compare import show
from isotune.cli.output import print_json, print_table

if TYPE_CHECKING:
    from isotune.comparison.recipe import ComparisonRecipe
    from isotune.training.demo import Demo

Flag = typer.Option

_HELP = """Adapt all-MiniLM-L6-v2 to SciCite: is a citation there for background, a method or a result?

A linear probe first, then HRA, and LoRA with the same number of parameters, both from the probe's head. The HRA
adapter is saved, exported as a LoRA, and both are loaded into fresh models that must predict the same. About five
minutes on two cores; nothing is downloaded.

With --seeds, a comparison in place of the demonstration, as isotune compare makes it: each method's learning rate is
searched with the same trials, then the best is run with that many other seeds.
"""


def demo_command(
    output: Annotated[Path, Flag(help="Folder for the runs.")] = Path("demo-run"),
    quick: Annotated[bool, Flag("--quick", help="Fewer rows: under a minute, worse results.")] = False,
    seeds: Annotated[int | None, Flag(min=2, max=10, help="Compare HRA and LoRA over this many seeds.")] = None,
    as_json: Annotated[bool, Flag("--json", help="Only the result, as JSON, on standard output.")] = False,
) -> None:
    from isotune.training.demo import run_demo

    if seeds is not None:
        from isotune.comparison import run

        found = run.compare(comparison(output, quick, seeds))
        print(json.dumps(found.model_dump())) if as_json else show(found)
        return
    demo = run_demo(output, quick)
    print_json(demo) if as_json else _show_demo(demo)


def comparison(output: Path, quick: bool, seeds: int) -> ComparisonRecipe:
    """HRA and LoRA on SciCite, of one size, each with its own search."""
    from isotune.comparison.recipe import build_comparison
    from isotune.training.demo import QUICK, settings

    chosen = {
        "method": {"name": "hra"},
        "compare.methods": "hra,lora",
        "compare.seeds": seeds,
        "compare.trials": 5,
        "compare.span": [0.3, 10],
        "compare.full": False,
        "compare.cost_steps": 0,
    }
    return build_comparison(flags={**settings(output, QUICK if quick else {}), **chosen})


def _show_demo(demo: Demo) -> None:
    print_table(
        "SciCite, test rows",
        ["method", "accuracy", "macro-F1", "parameters in the encoder", "seconds a step", "peak memory"],
        [
            [
                row.method,
                f"{100 * row.test_accuracy:.1f}",
                f"{100 * row.test_macro_f1:.1f}",
                f"{row.trainable_parameters_encoder:,}",
                "-" if row.seconds_per_step is None else f"{row.seconds_per_step:.3f}",
                "-" if row.peak_memory_bytes is None else f"{row.peak_memory_bytes / 2**20:,.0f} MiB",
            ]
            for row in demo.rows
        ],
    )
    print_table(
        f"Loaded into fresh models: the same predictions on {demo.test_rows} test rows",
        ["how", "rows"],
        [[how, f"{count} of {demo.test_rows}"] for how, count in demo.agree.items()],
        f"largest residual of the exported LoRA: {demo.export_residual:.1e}",
    )
    print(f"\nHRA adapter:   {demo.adapter}\nexported LoRA: {demo.exported}\n\nOn your own data:\n")
    print("  isotune train --model minilm --data train.csv --test test.csv --text text --label label --output my-run")
    print("  isotune predict my-run new.csv --output predictions.csv")
    print("  isotune export my-run --to lora --output my-lora")


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("demo", help=_HELP)(demo_command)
