"""`isotune merge` and what goes with it: `recover` and `statistics`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isotune.cli.output import print_json, print_table
from isotune.cli.report import write_beside
from isotune.errors import OptionError

if TYPE_CHECKING:
    from isotune.merging.explain import Explanation
    from isotune.merging.recipe import MergeRecipe
    from isotune.merging.record import MergeRecord

Flag = typer.Option
AsJson = Annotated[bool, Flag("--json", help="Only the result, as JSON, on standard output.")]

_MERGE_HELP = """Merge many adapters, or many fine-tuned models, into one.

Adapters (isotune's or PEFT's, any mix of ranks and layers) are merged in factored form, without the base model
where their methods allow; rules on rotations merge orthogonal adapters as rotations. Full models (safetensors,
sharded or not) are streamed tensor by tensor, and --base names what they were all fine-tuned from.

Examples:

  isotune merge runs/a runs/b runs/c --rule ties --weights 1,1,0.5 --set density=0.3 --modules drop --out merged

  isotune merge runs/a runs/b --explain

  isotune merge runs/a runs/b runs/c --rule knots --search 30 --modules a --out merged

  isotune merge ./tuned-1 ./tuned-2 --base ./base --rule task_arithmetic --set scale=0.4 --out merged --resume

  isotune merge recipe.yaml

A recipe is YAML: models (a list of folders, or of path, weight, name), rule (a name, or name and options), output,
rank, base, modules, seed.
"""


def merge_command(
    inputs: Annotated[list[str], typer.Argument(metavar="MODELS...", help="Folders, or one recipe (.yaml).")],
    rule: Annotated[str | None, Flag(help="Rule; isotune rules lists them.")] = None,
    weights: Annotated[str | None, Flag(help="A weight for each model: 1,1,0.5.")] = None,
    names: Annotated[str | None, Flag(help="A name for each model: a,b,c.")] = None,
    sets: Annotated[list[str] | None, Flag("--set", help="An option of the rule: --set density=0.3.")] = None,
    output: Annotated[str | None, Flag("--output", "--out", help="Folder to write.")] = None,
    rank: Annotated[
        int | None, Flag(help="Largest rank of the merged adapter; what it cuts off is reported.")
    ] = None,
    base: Annotated[str | None, Flag(help="The base model, where it is needed and not found.")] = None,
    modules: Annotated[
        str | None, Flag(help="Modules trained in full: average, drop, or the model whose modules to keep.")
    ] = None,
    vocabulary: Annotated[str | None, Flag(help="Full models: error, or intersect for the common rows.")] = None,
    seed: Annotated[int | None, Flag(help="Seed of rules that draw.")] = None,
    explain: Annotated[bool, Flag("--explain", help="Only say how the adapters agree and conflict.")] = False,
    search: Annotated[
        int | None, Flag(min=1, help="Search the weights in so many trials on the runs' validation rows.")
    ] = None,
    resume: Annotated[bool, Flag("--resume", help="Full models: go on where a merge was stopped.")] = False,
    force: Annotated[bool, Flag("--force", help="Merge adapters that name different bases.")] = False,
    report: Annotated[bool, Flag("--report/--no-report", help="Write report.html into the output folder.")] = True,
    as_json: AsJson = False,
) -> None:
    from isotune.merging.recipe import build_merge_recipe

    file = Path(inputs[0]) if len(inputs) == 1 and Path(inputs[0]).suffix in (".yaml", ".yml") else None
    flags: dict[str, Any] = {
        "rule.name": rule, "output": output, "rank": rank, "base": base, "modules": modules,
        "vocabulary": vocabulary, "seed": seed,
    }  # fmt: skip
    if file is None:
        flags["models"] = _models(inputs, weights, names)
    elif weights or names:
        raise OptionError("--weights and --names go with folders; in a recipe each model has its own weight and name")
    for item in sets or ():
        if not all(item.partition("=")[:2]):
            raise OptionError(f"--set takes option=value, not {item!r}; for example --set density=0.3")
    recipe = build_merge_recipe(file, flags, [f"rule.{item}" for item in sets or ()])
    if explain:
        _explain(recipe, as_json, force)
        return
    if recipe.output is None:
        raise OptionError("say where to write the result: --out FOLDER (or output: in the recipe)")
    from isotune.training.merging import merge_recipe

    try:
        merged = merge_recipe(recipe, force=force, resume=resume, search=search)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    assert merged.path is not None
    write_beside(merged.path, report)
    if as_json:
        print_json(merged)
        return
    _show(merged)


def _models(folders: list[str], weights: str | None, names: str | None) -> list[dict[str, Any]]:
    models: list[dict[str, Any]] = [{"path": folder} for folder in folders]
    for key, given in (("weight", weights), ("name", names)):
        if given is None:
            continue
        values = given.split(",")
        if len(values) != len(folders):
            raise OptionError(
                f"--{key}s has {len(values)} values for {len(folders)} models; give one each, in the same order"
            )
        for model, value in zip(models, values, strict=True):
            model[key] = _number(value) if key == "weight" else value.strip()
    return models


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise OptionError(f"--weights takes numbers with commas between them, not {text!r}") from None


def _explain(recipe: MergeRecipe, as_json: bool, force: bool) -> None:
    from isotune.training.merging import explain_recipe

    found = explain_recipe(recipe, force)
    if as_json:
        print_json(found)
        return
    _show_models(found)
    _show_layers(found)


def _show_models(found: Explanation) -> None:
    overall = found.overall
    print_table(
        f"{len(found.weights)} adapters, {len(found.sites)} layers, all layers together",
        ["models", "cosine", "sign conflict", "rows shared", "columns shared"],
        [
            [" / ".join(pair.models), *map(_figure, (pair.cosine, pair.sign_conflict)),
             _figure(pair.row_overlap), _figure(pair.column_overlap)]
            for pair in overall.pairs
        ],
        "cosine of the changes; share of |a b| where signs differ (by chance 0.5); overlap of row spaces (the inputs "
        "they read) and of column spaces (the outputs they write)",
    )  # fmt: skip
    print_table(
        "each adapter",
        ["model", "weight", "|W' - W|", "interference"],
        [
            [name, f"{found.weights[name]:g}", f"{norm:.4f}", _figure((overall.interference or {}).get(name))]
            for name, norm in overall.norms.items()
        ],
        "interference: what the others do to the inputs that it reads, relative to what it does there",
    )


def _show_layers(found: Explanation) -> None:
    cut = found.overall.truncation or {}
    print_table(
        "each layer",
        [
            "layer",
            "ranks",
            "|W' - W|",
            "sign conflict",
            "rows shared",
            "outvoted",
            "interference",
            *(f"rank {rank}" for rank in cut),
        ],
        [
            [
                site.path,
                " ".join(map(str, dict.fromkeys(site.ranks.values()))),
                _range(site.agreement.norms.values()),
                _mean(pair.sign_conflict for pair in site.agreement.pairs),
                _mean(pair.row_overlap for pair in site.agreement.pairs),
                _figure(site.agreement.outvoted),
                _figure(max((site.agreement.interference or {}).values(), default=None)),
                *(_figure((site.agreement.truncation or {}).get(rank)) for rank in cut),
            ]
            for site in found.sites
        ],
        "; ".join(
            [
                "sign conflict, rows shared: means over the pairs",
                "outvoted: share of the changes' entries, by size, whose sign the sum turns",
                "interference: the worst; rank: relative error of the exact weighted sum at that rank",
                *found.notes,
            ]
        ),
    )


def _mean(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return _figure(sum(known) / len(known) if known else None)


def _range(values: Iterable[float]) -> str:
    low, high = min(values := list(values)), max(values)
    return f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _show(merged: MergeRecord) -> None:
    """What was written, in a table for each layer where there is one for each layer."""
    from isotune.merging.record import MergedAdapter

    if isinstance(merged, MergedAdapter):
        print_table(
            f"{merged.path}: {len(merged.models)} adapters merged by {merged.rule} in {merged.seconds:.1f} s",
            ["layer", "rank", "error"],
            [[path, str(rank), f"{merged.errors.get(path, 0.0):.1e}"] for path, rank in merged.ranks.items()],
            "; ".join(
                [
                    f"weights {', '.join(f'{name} {weight:g}' for name, weight in merged.models.items())}",
                    f"error: |written - merged| / |merged|, {merged.error:.1e} over all layers",
                    *([f"trained in full: {', '.join(merged.modules)}"] if merged.modules else []),
                    *merged.notes,
                ]
            ),
        )
        return
    print_table(str(merged.path), ["", ""], [[name, _said(value)] for name, value in merged])


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_said(own)}" for name, own in value.items()) or "-"
    if isinstance(value, list | tuple):
        return "; ".join(map(_said, value)) or "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def recover_command(
    folder: Annotated[Path, typer.Argument(help="What `isotune merge --rule rmm` wrote.")],
    name: Annotated[str, typer.Argument(help="The adapter's name in it.")],
    output: Annotated[Path, Flag("--output", "--out", help="Folder to write: new, or an older adapter.")],
    as_json: AsJson = False,
) -> None:
    """Get one adapter back, by its name, from what `isotune merge --rule rmm` wrote."""
    from isotune.merging.reversible.adapters import recover_adapter

    written = recover_adapter(folder, name, output)
    print_json({"path": written}) if as_json else print(f"{written}: {name}, as a LoRA")


def statistics_command(
    run: Annotated[Path, typer.Argument(help="A run's folder, or an adapter or model that isotune train wrote.")],
    fisher: Annotated[bool, Flag("--fisher", help="The diagonal Fisher information, for rule fisher.")] = False,
    data: Annotated[str | None, Flag(help="Rows to measure on; by default the run's training rows.")] = None,
    model: Annotated[str | None, Flag(help="The pretrained model, if it has moved.")] = None,
    examples: Annotated[int, Flag(min=1, help="How many examples, drawn by the seed.")] = 256,
    expectation: Annotated[
        str | None, Flag(help="Over labels: exact, sample or empirical; by default exact, of text sample.")
    ] = None,
    seed: Annotated[int, Flag(help="Seed of the examples, and of labels that are drawn.")] = 0,
    force: Annotated[bool, Flag("--force", help="Accept a base model unlike the adapter's own.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure what some rules of merging need to know of what a run trained; a file beside its weights holds it."""
    from isotune.training.statistics import collect_fisher

    if not fisher:
        raise OptionError(
            "say what to measure: --fisher; second moments are saved by isotune train --set save_second_moments=true"
        )
    if expectation not in (None, "exact", "sample", "empirical"):
        raise OptionError(f"--expectation {expectation!r} is unknown; choose exact, sample or empirical")
    kind: Any = expectation
    written = collect_fisher(run, data, model=model, examples=examples, expectation=kind, seed=seed, force=force)
    print_json({"path": written}) if as_json else print(f"{written}: written")


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    app.command("merge", help=_MERGE_HELP)(merge_command)
    app.command("recover")(recover_command)
    app.command("statistics")(statistics_command)
