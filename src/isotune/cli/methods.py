"""`isotune methods`: the table of methods on the screen, as JSON, or as a Markdown file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isotune.cli.method_pages import method_page, said
from isotune.cli.output import print_json, print_table, write_text
from isotune.errors import OptionError

if TYPE_CHECKING:
    from isotune.adapters.settings import Settings
    from isotune.model.catalogue import MethodInfo
    from isotune.sites import Site

Flag = typer.Option

CAPTION = "default options, by probing; W is (n_out, n_in)"
COLUMNS = ["method", "parameters a layer", "identity at start", "folds", "exact LoRA of", "PEFT", "layers"]

_OPENING = """# Methods

Written by `isotune methods --write docs/methods.md`; do not edit. Each method was built at its default options and
probed; W is (n_out, n_in).

*Identity at start*: a fresh adapter leaves the output as it was. *Folds*: all of it can be put into the weight and
the bias. *Exact LoRA of*: the rank of W' - W where it is given as B A, which `isotune export --to lora` writes;
full is the smaller side of the layer.
*PEFT*: a saved adapter loads there. *Learning rate*: what a recipe without one gets."""

_HELP = """List the methods: equation, parameters, what each supports. All of it is probed, not typed in.

Examples:

  isotune methods hra

  isotune methods --layer 4096 4096

  isotune methods --model ./llama --targets all-linear --json
"""


def methods_command(
    name: Annotated[str | None, typer.Argument(help="One method: its equation, paper, cost and options.")] = None,
    layer: Annotated[tuple[int, int] | None, Flag(help="Count parameters at a layer of IN and OUT.")] = None,
    model: Annotated[str | None, Flag(help="Count parameters on a model: folder or hub id; minilm.")] = None,
    targets: Annotated[str, Flag(help="With --model: which layers, as in a recipe.")] = "attention",
    write: Annotated[Path | None, Flag(help="Write isotune's own methods as Markdown to this file.")] = None,
    pages: Annotated[Path | None, Flag(help="Write a page a method, as Markdown, into this folder.")] = None,
    as_json: Annotated[bool, Flag("--json", help="Only the result, as JSON, on standard output.")] = False,
) -> None:
    from isotune.adapters.registry import BUILT_IN, method_class
    from isotune.model.catalogue import methods

    found = methods(_sites(layer, model, targets), [name] if name else None)
    if write is not None:
        write_text(write, markdown([m for m in found if m.name in BUILT_IN]))
    if pages is not None:
        for m in found:
            write_text(pages / f"{m.name}.md", method_page(m, method_class(m.name)))
    if as_json:
        print_json(found)
    elif written := [str(path) for path in (write, pages) if path is not None]:
        print(f"{' and '.join(written)}: written, {len(found)} methods")
    elif name is not None:
        _explain(found[0], method_class(name))
    else:
        _show(found, "layer" if layer else f"{model}, {targets}" if model else None)


def _sites(layer: tuple[int, int] | None, model: str | None, targets: str) -> dict[str, Site]:
    """The layers that were asked for, without values."""
    from isotune.model.catalogue import linear_site

    if layer is not None and model is not None:
        raise OptionError("methods takes --layer or --model, not both")
    if layer is not None:
        return {f"a layer of {layer[0]} to {layer[1]}": linear_site(*layer)}
    if model is None:
        return {}
    from isotune.model.targets import find_targets
    from isotune.sites import require_site
    from isotune.training.models import load_empty

    layers = find_targets(load_empty(model), targets)
    return {path: require_site(module, path) for path, module in layers.items()}


def _show(found: list[MethodInfo], counted: str | None) -> None:
    header = [*COLUMNS[:2], *([counted] if counted else []), *COLUMNS[2:]]
    rows = [[m.name, m.parameters, *([_count(m)] if counted else []), *_properties(m)] for m in found]
    print_table("Methods", header, rows, CAPTION)
    for m in found:
        if m.misfit:
            print(f"{m.name} does not fit: {m.misfit}")
    for m in found:
        options = [[name, text] for name, text in m.options.items()]
        print_table(f"{m.name}: {m.equation}", ["option", "meaning"], options, f"learning rate: {m.learning_rate:g}")


def _explain(m: MethodInfo, kind: type[Settings]) -> None:
    """One method: what its module says of it, what probing shows, and its options."""
    print((sys.modules[kind.__module__].__doc__ or m.name).strip() + "\n")
    rows = [[title, value] for title, value in zip(COLUMNS[1:], [m.parameters, *_properties(m)], strict=True)]
    counted = [] if m.trainable is None else [["parameters there", _count(m)]]
    print_table(m.name, ["", CAPTION], [*rows, *counted, ["learning rate", f"{m.learning_rate:g}"]])
    defaults = {name: field.default for name, field in kind.model_fields.items()}
    options = [[option, str(defaults[option]), text] for option, text in m.options.items()]
    print_table(f"options of {m.name}", ["option", "default", "meaning"], options)
    if m.misfit:
        print(f"{m.name} does not fit: {m.misfit}")


def _count(m: MethodInfo) -> str:
    return "-" if m.trainable is None else f"{m.trainable:,}"


def _properties(m: MethodInfo) -> list[str]:
    return [said(m.identity_at_start), said(m.foldable), m.lora_rank or "no", said(m.peft), ", ".join(m.kinds)]


def markdown(found: list[MethodInfo]) -> str:
    """The table, and every method's equation and options."""
    header = [*COLUMNS, "learning rate"]
    lines = [header, ["---"] * len(header)]
    for m in found:
        lines.append([f"[`{m.name}`](#{m.name})", f"`{m.parameters}`", *_properties(m), f"{m.learning_rate:g}"])
    parts = [_OPENING, "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)]
    for m in found:
        options = "\n".join(f"- `{name}`: {text}" for name, text in m.options.items())
        parts += [f"## {m.name}", m.equation, *([options] if options else [])]
    return "\n\n".join(parts) + "\n"


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|")


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("methods", help=_HELP)(methods_command)
