"""The page of every key of every recipe, from the recipes themselves: `python -m isotune.cli.recipe_page FILE`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from isotune.cli.method_pages import markdown_table, option_row, properties
from isotune.comparison.recipe import CompareSettings
from isotune.merging.recipe import Input, MergeRecipe
from isotune.recipes import Section
from isotune.training.recipe import DataSettings, ForgettingSettings, Recipe

_TABLES: list[tuple[str, str, type[Section]]] = [
    ("A training run", "`isotune train recipe.yaml`. Every key may also be given as `--set key=value`.", Recipe),
    ("data", "The section `data` of a training run.", DataSettings),
    ("compare", "The section `compare` makes the recipe one of `isotune compare recipe.yaml`.", CompareSettings),
    ("compare.forgetting", "What is measured beside the task; see [comparing](compare.md).", ForgettingSettings),
    ("A merge", "`isotune merge recipe.yaml`; see [merging](merging.md).", MergeRecipe),
    ("models", "Each of the `models` of a merge: a folder, or these keys.", Input),
]
_KEYS = """# Keys of recipes

Recipes are YAML; a key that is none is refused with the one that was perhaps meant. `training` takes every field of
[transformers.TrainingArguments](https://huggingface.co/docs/transformers/main_classes/trainer), `method` the
[method's](methods.md) options, `rule` the [rule's](rules.md). This page is written by
`python -m isotune.cli.recipe_page docs/recipe-keys.md`."""


def recipe_page() -> str:
    """The page as Markdown."""
    parts = [_KEYS]
    for title, about, section in _TABLES:
        rows = [option_row(name, schema) for name, schema in properties(section).items() if not _is_section(schema)]
        parts.append(f"## {title}\n\n{about}\n\n{markdown_table(['key', 'values', 'default', 'what it is'], rows)}")
    return "\n\n".join(parts) + "\n"


def _is_section(schema: dict[str, Any]) -> bool:
    """Whether it has a table of its own."""
    return (schema.get("type") == "object" and "properties" in schema) or "$ref" in str(schema.get("anyOf", ""))


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(recipe_page(), encoding="utf-8")
