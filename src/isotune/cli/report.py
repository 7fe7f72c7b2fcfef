"""`isotune report`, and the reports that other commands leave beside their results."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from isotune.cli.output import print_json
from isotune.errors import IsotuneError

Flag = typer.Option

_HELP = """Write a report: one HTML page, verdict first, that needs no network.

Takes the folders of comparisons (isotune compare), runs (isotune train), adapters and models, in any mix, and shows
them together. What the adaptations did to the weights is measured for the first seed of each row of a comparison, and
for every run, adapter and model, where the weights and their base are at hand.

Examples:

  isotune report sweeps/scicite -o scicite.html

  isotune report runs/full runs/lora runs/hra --base ./base

  isotune report merged --no-diagnose --json
"""


def report_command(
    paths: Annotated[list[Path], typer.Argument(metavar="FOLDERS...", help="Comparisons, runs, adapters, models.")],
    output: Annotated[Path, Flag("--output", "-o", "--out", help="The page to write.")] = Path("report.html"),
    base: Annotated[str | None, Flag(help="The base model, where adapters do not say it or it has moved.")] = None,
    diagnose: Annotated[
        bool, Flag("--diagnose/--no-diagnose", help="Measure what the adaptations did to the weights.")
    ] = True,
    most: Annotated[int, Flag("--diagnose-most", min=1, help="Diagnose at most so many models.")] = 12,
    as_json: Annotated[bool, Flag("--json", help="Only the verdict, as JSON, on standard output.")] = False,
) -> None:
    from isotune.report import build

    verdicts = build(paths, output, base, diagnose, most)
    if as_json:
        print_json({"path": output, "verdicts": verdicts})
        return
    for verdict in verdicts:
        print(verdict.subject)
        for said in verdict.headlines:
            print(f"  {said}")
        for said in verdict.cautions:
            print(f"  ! {said}")
    print(f"{output}: written", file=sys.stderr)


def write_beside(folder: Path, report: bool) -> None:
    """Write `report.html` into a finished run's or merge's folder, without a diagnosis, which takes longer.

    Nothing where plotly is not installed, or `report` is false: a page of an older result is removed then. What goes
    wrong is told in a line, and never fails what was finished before.
    """
    page = folder / "report.html"
    try:
        page.unlink(missing_ok=True)
        from isotune.report.page import build, has_plotly

        if report and has_plotly():
            build([folder], page, diagnose=False)
            print(f"{page}: the report", file=sys.stderr)
    except IsotuneError as error:
        print(f"isotune: no report was written: {error}", file=sys.stderr)
    except Exception as error:
        print(f"isotune: no report was written, {type(error).__name__}: {error}", file=sys.stderr)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("report", help=_HELP)(report_command)
