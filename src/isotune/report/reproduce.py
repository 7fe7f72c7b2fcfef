"""How to get the same again: commands, recipes, settings and versions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from isotune.report.data import Comparison, Json, RunResult, Weights
from isotune.report.tables import Table, TableCell, simple, text


@dataclass(frozen=True)
class TextBlock:
    """A titled text as it is, such as a recipe, or a table."""

    title: str
    code: str = ""
    table: Table | None = None
    folded: bool = False


def reproduce_comparison(comparison: Comparison) -> Iterator[TextBlock]:
    """The command, the versions, the recipe."""
    summary = comparison.summary
    names = ("task", "model", "metric", "baseline", "seeds", "trials", "confidence")
    chosen: Json = {name: own for name in names if (own := getattr(summary, name))}
    yield TextBlock(f"{comparison.name}: settings and versions", table=_pairs({**chosen, **summary.environment}))
    if comparison.recipe is not None:
        yield TextBlock(f"{comparison.name}: run it again", f"isotune compare {comparison.path.name}/comparison.yaml")
        yield TextBlock(f"{comparison.name}: comparison.yaml", comparison.recipe, folded=True)


def reproduce_run(run: RunResult) -> Iterator[TextBlock]:
    """The versions and the recipe."""
    keys = [
        key for key in run.metrics if key.endswith("_version") or key in ("seed", "steps", "epochs", "learning_rate")
    ]
    yield TextBlock(f"{run.name}: settings and versions", table=_pairs({key: run.metrics[key] for key in keys}))
    yield TextBlock(f"{run.name}: run it again", f"isotune train {run.path.name}/recipe.yaml --output another-folder")
    yield TextBlock(f"{run.name}: recipe.yaml", run.recipe_text, folded=True)


def reproduce_weights(one: Weights) -> Iterator[TextBlock]:
    """What the folder says about itself."""
    merge = one.merge.model_dump(mode="json") if one.merge else {}
    told: Json = {
        "kind": one.kind,
        "base model": one.config.get("base_model_name_or_path"),
        "method": str(one.config.get("peft_type", "")).lower() or one.config.get("model_type"),
        **{
            key: merge[key]
            for key in ("rule", "options", "seed", "notes", "seconds", "isotune", "torch")
            if merge.get(key)
        },
    }
    yield TextBlock(f"{one.name}: settings", table=_pairs({key: value for key, value in told.items() if value}))


def _pairs(values: Json) -> Table:
    lines: list[list[TableCell | str]] = [[key.replace("_", " "), _cell(value)] for key, value in values.items()]
    return simple("Settings", ["setting", "value"], lines, sortable=False)


def _cell(value: Any) -> TableCell:
    if isinstance(value, dict):
        value = [f"{key} {own}" for key, own in value.items()] or "–"
    return text("; ".join(map(str, value)) if isinstance(value, list | tuple) else str(value), "long")
