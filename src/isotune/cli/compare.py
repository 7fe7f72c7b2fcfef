"""`isotune compare`: flags in, a table of methods out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isotune.cli.output import print_table
from isotune.cli.report import write_beside

if TYPE_CHECKING:
    from isotune.comparison.results import Summary
    from isotune.intervals import Interval

Flag = typer.Option

_HELP = """Compare methods on one task: at equal budgets, with an equal search for the learning rate, over seeds.

The recipe is one of `isotune train`; a section `compare` in it, or the flags, say what is compared. At each budget
every method gets the size whose trainable parameters come nearest. Learning rates are tried with one seed and chosen
on the validation rows; the best one is then trained with other seeds and measured on the test rows. Full fine-tuning
and the frozen model stand beside them. At the end a few steps of each are timed alone.

Everything is in the output folder: results.jsonl (a line a run), index.sqlite, summary.json, report.html. Stop it
whenever you like: the same command goes on where it was.

Examples:

  isotune compare recipe.yaml --methods hra,lora,oft --budget 40k --budget 80k --seeds 3 --trials 8 --plan

  isotune compare recipe.yaml --methods hra,lora,oft --budget 40k --workers 2

  isotune compare recipe.yaml --set compare.forgetting.train=other.csv --set compare.forgetting.label=intent

  isotune compare recipe.yaml --ray auto
"""


def compare_command(
    recipe: Annotated[Path | None, typer.Argument(help="Recipe file (YAML).", show_default=False)] = None,
    methods: Annotated[str | None, Flag(help="Names of methods, with commas; see isotune methods.")] = None,
    budget: Annotated[list[str] | None, Flag(help="Trainable parameters beside the head: 40k. Repeatable.")] = None,
    seeds: Annotated[int | None, Flag(help="Seeds at each method's best learning rate; by default 3.")] = None,
    trials: Annotated[int | None, Flag(help="Learning rates tried for each method; by default 8.")] = None,
    baseline: Annotated[str | None, Flag(help="The method that others are set against; by default lora.")] = None,
    metric: Annotated[str | None, Flag(help="What methods are compared by; by default the task's first.")] = None,
    output: Annotated[str | None, Flag(help="Folder for the comparison.")] = None,
    sets: Annotated[
        list[str] | None, Flag("--set", help="key=value over the recipe: --set compare.span=[0.1,30].")
    ] = None,
    workers: Annotated[int | None, Flag(min=1, help="Runs at once; by default 1.")] = None,
    ray: Annotated[
        str | None, Flag(help="Run on the Ray cluster at this address; auto finds one, local starts one.")
    ] = None,
    retry: Annotated[bool, Flag("--retry", help="Run what failed once more.")] = False,
    plan: Annotated[bool, Flag("--plan", help="Only show what would be run.")] = False,
    report: Annotated[bool, Flag("--report/--no-report", help="Leave a page to read, report.html.")] = True,
    as_json: Annotated[bool, Flag("--json", help="Only the result, as JSON, on standard output.")] = False,
) -> None:
    from isotune.comparison.plan import make_plan
    from isotune.comparison.recipe import build_comparison
    from isotune.training.progress import quiet_libraries

    flags = {
        "compare.methods": methods, "compare.budgets": budget or None, "compare.seeds": seeds,
        "compare.trials": trials, "compare.baseline": baseline, "metric": metric, "output": output,
    }  # fmt: skip
    built = build_comparison(recipe, flags, sets or ())
    from isotune.comparison.store import Store

    built = built.resolved()
    Store(built.output).check(built)
    quiet_libraries()
    cells = make_plan(built)
    if plan and as_json:
        print(json.dumps([{**vars(cell), "far": cell.far} for cell in cells]))
        return
    if not as_json:
        _show_plan(cells, built)
    if plan:
        return
    found = _compared(built, cells, workers, ray, retry)
    write_beside(Path(built.output), report)
    if as_json:
        print(json.dumps(found.model_dump()))
        return
    show(found)
    for reason in found.without_result:
        print(reason, file=sys.stderr)
    print(
        f"{built.output}: finished. With what the runs did to the weights: isotune report {built.output}",
        file=sys.stderr,
    )


def _compared(recipe: Any, cells: Any, workers: int | None, ray: str | None, retry: bool) -> Summary:
    from isotune.comparison.run import compare

    try:
        return compare(recipe, workers, ray, retry, plan=cells)
    except KeyboardInterrupt:
        print(
            f"\nisotune: stopped; what is finished is in {recipe.output}, and the same command goes on",
            file=sys.stderr,
        )
        raise typer.Exit(130) from None


def _show_plan(cells: Any, recipe: Any) -> None:
    from isotune.comparison.units import planned

    of = recipe.compare
    low, high = of.span
    print_table(
        f"{planned(cells, recipe)} runs; of each row {of.trials} learning rates, then {of.seeds} seeds",
        ["method", "budget", "size", "parameters", "learning rates"],
        [
            [
                cell.label,
                "-" if cell.budget is None else f"{cell.budget:,}",
                ", ".join(f"{key}={value}" for key, value in cell.options.items()) or "-",
                f"{cell.parameters:,}" + (" (far)" if cell.far else ""),
                "-" if cell.rate is None else f"{cell.rate * low:.3g} to {cell.rate * high:.3g}",
            ]
            for cell in cells
        ],
        "far: no size of the method comes within a tenth of the budget" if any(cell.far for cell in cells) else None,
    )


def show(found: Summary) -> None:
    """A summary as a table on standard output, best first."""
    print_table(
        f"{found.metric} on the test rows: mean and {found.confidence}",
        ["method", "parameters", "learning rate", found.metric, f"minus {found.baseline}", *found.forgetting,
         "s a step", "peak MB", "KB stored", "LoRA rank"],
        [
            [
                f"{row.method} {'*' if row.front else ''}".strip(),
                f"{row.parameters:,}",
                _figure(row.learning_rate, "{:g}") + (" (edge)" if row.edge else ""),
                _interval(row.score, found.metric),
                _interval(row.difference, found.metric, signed=True),
                *(_interval(row.forgetting.get(name), name) for name in found.forgetting),
                _figure(row.seconds_per_step, "{:.3f}"),
                _figure(row.peak_memory_bytes, "{:.0f}", 1e6),
                _figure(row.adapter_bytes, "{:.0f}", 1e3),
                _figure(row.export_rank, "{}"),
            ]
            for row in found.rows
        ],
        "*: no other row is as good with fewer parameters; edge: the best rate is the first or last of those tried",
    )  # fmt: skip


def _interval(found: Interval | None, metric: str, signed: bool = False) -> str:
    """`98.1 ± 0.4`; with its ends in brackets where it would reach beyond what the metric can be."""
    from isotune.report.words import is_share

    if found is None:
        return "-"
    scale, digits = (100, 1) if is_share(metric) else (1, 3)
    mean, ends = f"{scale * found.mean:{'+' if signed else ''}.{digits}f}", found.bounds(metric, signed)
    if found.half_width is None or ends is None:
        return mean
    if found.leaves_range(metric, signed):
        return f"{mean} [{', '.join(f'{scale * end:.{digits}f}' for end in ends)}]"
    return f"{mean} ± {scale * found.half_width:.{digits}f}"


def _figure(value: float | None, shape: str, unit: float = 1) -> str:
    return "-" if value is None else shape.format(value / unit if unit != 1 else value)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("compare", help=_HELP)(compare_command)
