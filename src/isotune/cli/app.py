"""The `isotune` command: registers the subcommands and turns an IsotuneError into one message, exit code 2."""

from __future__ import annotations

import sys

import typer

from isotune.cli import compare, demo, export, inspect, merge, methods, report, rules, train
from isotune.errors import IsotuneError

app = typer.Typer(
    name="isotune",
    help="Adapt pretrained PyTorch models with orthogonal and low-rank adapters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

train.register(app)
compare.register(app)
methods.register(app)
inspect.register(app)
export.register(app)
merge.register(app)
rules.register(app)
report.register(app)
demo.register(app)


def main() -> None:
    """Entry point of the console command."""
    try:
        app()
    except IsotuneError as error:
        print(f"isotune: {error}", file=sys.stderr)
        sys.exit(2)
