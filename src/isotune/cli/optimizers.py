"""`isotune optimizers`: the optimizers on the screen, as JSON, or as a Markdown file."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from isotune.cli.method_pages import markdown_table, prose
from isotune.cli.output import print_json, print_table, write_text
from isotune.errors import OptionError, nearest

Flag = typer.Option


class Described(NamedTuple):
    """An optimizer as its module, its class and its arguments have it."""

    name: str
    public: str
    """Its name in `isotune.optim`."""
    summary: str
    about: str
    module: str
    in_recipes: bool
    arguments: dict[str, tuple[str, str]]
    """By name the default, as Python has it, and the meaning."""


def optimizers_command(
    name: Annotated[str | None, typer.Argument(help="One of them: its equations, paper and arguments.")] = None,
    write: Annotated[Path | None, Flag(help="Write all of them as Markdown to this file.")] = None,
    as_json: Annotated[bool, Flag("--json", help="Only the result, as JSON, on standard output.")] = False,
) -> None:
    """List isotune's optimizers, or explain one of them."""
    every = described()
    found = [one for one in every if name in (None, one.name)]
    if not found:
        names = [one.name for one in every]
        raise OptionError(f"optimizer {name!r} is unknown.{nearest(str(name), names)} There are: {', '.join(names)}")
    if write is not None:
        write_text(write, optimizers_page(found))
    if as_json:
        print_json([one._asdict() for one in found])
    elif write is not None:
        print(f"{write}: written, {len(found)} optimizers")
    elif name is not None:
        print(found[0].about)
        rows = [[key, default, text] for key, (default, text) in found[0].arguments.items()]
        print_table(f"arguments of isotune.optim.{found[0].public}", ["argument", "default", "meaning"], rows)
    else:
        rows = [[one.name, one.summary, _where(one)] for one in found]
        note = "in a recipe: optimizer: NAME; isotune optimizers NAME explains one"
        print_table(f"{len(found)} optimizers", ["name", "what it does", "where"], rows, note)


def described() -> list[Described]:
    """All of them, those of recipes first."""
    import isotune.optim
    from isotune.optim.names import OF_LOOPS, OPTIMIZERS

    found = []
    for name, public in {**OPTIMIZERS, **OF_LOOPS}.items():
        thing = getattr(isotune.optim, public)
        about = (sys.modules[thing.__module__].__doc__ or "").strip()
        summary = about.split("\n\n")[0].replace("\n", " ").rstrip(".")
        in_recipes = name in OPTIMIZERS and name != "scion_light"
        module = f"src/{thing.__module__.replace('.', '/')}.py"
        found.append(Described(name, public, _own(thing, summary), about, module, in_recipes, _arguments(thing)))
    return found


def _own(thing: Any, summary: str) -> str:
    """What it does in a line: of two that share a module, or of a function, as its own docstring has it."""
    first = (thing.__doc__ or "").split("\n")[0].rstrip(".")
    alone = thing.__module__.rpartition(".")[2] == thing.__name__.lower()
    return summary if alone else first


def _arguments(thing: Any) -> dict[str, tuple[str, str]]:
    """From the signatures and the docstrings of a class and of what it is built on."""
    kinds = [thing] if inspect.isfunction(thing) else thing.__mro__
    ours = [kind for kind in kinds if kind.__module__.startswith("isotune.optim")]
    meanings: dict[str, str] = {}
    for kind in reversed(ours):
        meanings |= _meanings(kind.__doc__ or "")
    found: dict[str, tuple[str, str]] = {}
    for kind in ours:
        for key, parameter in inspect.signature(kind).parameters.items():
            if key in meanings and key not in found:
                empty = parameter.default is inspect.Parameter.empty
                found[key] = ("-" if empty else repr(parameter.default), meanings[key])
    return found


def _meanings(docstring: str) -> dict[str, str]:
    """The section Args of a docstring."""
    section = re.search(r"Args:\n(.*?)(\n\s*\n|\Z)", inspect.cleandoc(docstring), re.DOTALL)
    entries = (
        re.findall(r"^    (\w+): (.*?)(?=^    \w+: |\Z)", section[1], re.DOTALL | re.MULTILINE) if section else []
    )
    return {key: " ".join(text.split()) for key, text in entries}


def _where(one: Described) -> str:
    return "recipes and loops" if one.in_recipes else "loops of one's own"


def optimizers_page(found: list[Described]) -> str:
    """The reference as Markdown: a table, and a section each."""
    rows = [[f"[`{one.name}`](#{one.name})", prose(one.summary), _where(one)] for one in found]
    parts = [
        "# All optimizers",
        "Written by `isotune optimizers --write docs/optimizers.md`; do not edit. How to use them: "
        "[learning rates and optimizers](learning-rates.md).",
        markdown_table(["name", "what it does", "where"], rows),
    ]
    return "\n\n".join(parts + [optimizer_section(one) for one in found]) + "\n"


def optimizer_section(one: Described, level: str = "##") -> str:
    """What one of them is, with its arguments."""
    rows = [[f"`{key}`", f"`{default}`", prose(text)] for key, (default, text) in one.arguments.items()]
    use = f"`optimizer: {one.name}` in a recipe, `isotune.optim.{one.public}` in a loop."
    return "\n\n".join(
        [
            f"{level} {one.name}",
            *map(prose, one.about.split("\n\n")),
            use if one.in_recipes else f"`isotune.optim.{one.public}`, for loops of one's own.",
            markdown_table(["argument", "default", "meaning"], rows),
            f"Source: `{one.module}`",
        ]
    )


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("optimizers")(optimizers_command)
