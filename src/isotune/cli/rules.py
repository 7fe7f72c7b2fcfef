"""`isotune rules`: the rules of merging on the screen, as JSON, or as a Markdown file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from isotune.cli.output import print_json, print_table, write_text

if TYPE_CHECKING:
    from isotune.merging.registry import RuleRow

Flag = typer.Option


def rules_command(
    name: Annotated[str | None, typer.Argument(help="One rule: its equation, paper, cost and options.")] = None,
    write: Annotated[Path | None, Flag(help="Write isotune's own rules as Markdown to this file.")] = None,
    as_json: Annotated[bool, Flag("--json", help="Only the result, as JSON, on standard output.")] = False,
) -> None:
    """List the rules of `isotune merge`, or explain one of them."""
    from isotune.merging.registry import BUILT_IN, rule_class, rules

    found = [row for row in rules() if name in (None, row.name)]
    if not found:
        rule_class(str(name))
    if write is not None:
        write_text(write, _markdown([row for row in found if row.name in BUILT_IN]))
    if as_json:
        print_json(found)
    elif write is not None:
        print(f"{write}: written, {len(found)} rules")
    elif name is not None:
        print(found[0].about)
        options = [[option, str(found[0].options[option]), text] for option, text in found[0].meanings.items()]
        print_table(f"options of {name}", ["option", "default", "meaning"], options)
    else:
        body = [[row.name, row.summary, row.merges, row.models, _order(row), row.needs or "-"] for row in found]
        print_table(f"{len(found)} rules", COLUMNS, body, f"{_ON}; isotune rules NAME explains one")


COLUMNS = ["rule", "what it does", "on", "models", "order", "needs"]
_ON = (
    "on: changes of weights, of adapters or full models; their single entries, for which an adapter's result is cut "
    "to a rank; rotations; whole adapters; or whole models"
)


def _order(row: RuleRow) -> str:
    return "matters" if row.ordered else "-"


def _markdown(found: list[RuleRow]) -> str:
    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    for row in found:
        lines.append(
            [f"[`{row.name}`](#{row.name})", row.summary, row.merges, row.models, _order(row), row.needs or "-"]
        )
    parts = [
        "# Rules of merging",
        "Written by `isotune rules --write docs/rules.md`; do not edit. How to merge: [merging.md](merging.md).",
        _ON[0].upper() + _ON[1:] + ". *Order*: whether that of the models matters. *Needs*: a statistic that each "
        "adapter has to come with.",
        "\n".join(f"| {' | '.join(line)} |" for line in lines),
    ]
    for row in found:
        options = "\n".join(f"- `{option}` ({row.options[option]}): {text}" for option, text in row.meanings.items())
        parts += [f"## {row.name}", row.about, *([options] if options else [])]
    return "\n\n".join(parts) + "\n"


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("rules")(rules_command)
