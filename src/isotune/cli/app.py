"""The `isotune` command: registers the subcommands and turns an IsotuneError into one message, exit code 2."""

from __future__ import annotations

import inspect
import logging
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from isotune.cli import chat, compare, demo, export, merge, methods, optimizers, predict, report, rules, train
from isotune.cli import inspect as inspecting
from isotune.errors import IsotuneError, IsotuneWarning
from isotune.version import __version__


class _Once(TyperCommand):
    """A command that refuses an option given twice, of which the last would win in silence."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for parameter, count in Counter(order).items():
            if count > 1 and not any(getattr(parameter, kind, False) for kind in ("multiple", "is_flag")):
                raise IsotuneError(f"{parameter.opts[0]} was given {count} times and takes one value; give it once")
        return super().parse_args(ctx, args)


class _App(typer.Typer):
    """Typer, with words in square brackets left as they are in the help."""

    def command(self, *args: Any, help: str | None = None, **kwargs: Any) -> Callable[[Any], Any]:
        def decorate(function: Any) -> Any:
            text = help or inspect.getdoc(function) or ""
            return add(*args, help=text.replace("[", "\\["), cls=_Once, **kwargs)(function)

        add = super().command
        return decorate


app = _App(
    name="isotune",
    help="Adapt pretrained PyTorch models with orthogonal and low-rank adapters.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        print(f"isotune {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


train.register(app)
predict.register(app)
chat.register(app)
compare.register(app)
methods.register(app)
inspecting.register(app)
export.register(app)
merge.register(app)
rules.register(app)
optimizers.register(app)
report.register(app)
demo.register(app)


def main() -> None:
    """Entry point of the console command."""
    for noisy in ("torchao", "torch.utils._pytree"):  # what other packages say of themselves on import
        logging.getLogger(noisy).setLevel(logging.ERROR)
    shown = warnings.showwarning

    def show(message: Any, category: type[Warning], *args: Any, **kwargs: Any) -> None:
        if issubclass(category, IsotuneWarning):
            print(f"isotune: {message}", file=sys.stderr)
        else:
            shown(message, category, *args, **kwargs)

    warnings.showwarning = show
    try:
        app()
    except IsotuneError as error:
        print(f"isotune: {error}", file=sys.stderr)
        sys.exit(2)
