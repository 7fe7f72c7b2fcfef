"""`isotune merge` and `isotune recover`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from isotune.cli.output import print_json
from isotune.errors import OptionError

Flag = typer.Option
AsJson = Annotated[bool, Flag("--json", help="Only the result, as JSON, on standard output.")]

_MERGE_HELP = """Merge many adapters, or many fine-tuned models, into one.

Adapters (isotune's or PEFT's, any mix of ranks and layers) are merged in factored form, without the base model
where their methods allow; rules on rotations merge orthogonal adapters as rotations. Full models (safetensors,
sharded or not) are streamed tensor by tensor, and --base names what they were all fine-tuned from.

Examples:

  isotune merge runs/a runs/b runs/c --rule ties --weights 1,1,0.5 --set density=0.3 --out merged

  isotune merge runs/a runs/b --explain

  isotune merge runs/a runs/b runs/c --rule knots --search 30 --out merged

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
    recipe = build_merge_recipe(file, flags, [f"rule.{item}" for item in sets or ()])
    if explain:
        _explain(recipe, as_json)
        return
    if recipe.output is None:
        raise OptionError("say where to write the result: --out FOLDER (or output: in the recipe)")
    from isotune.training.merging import merge_recipe

    try:
        merged = merge_recipe(recipe, force=force, resume=resume, search=search)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
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
