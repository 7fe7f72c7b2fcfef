"""The page of recipes' keys is what the recipes say."""

from __future__ import annotations

from examples import DOCS
from isotune.cli.recipe_page import recipe_page
from isotune.training.recipe import DataSettings, Recipe


def test_the_page_is_up_to_date() -> None:
    page = (DOCS / "recipe-keys.md").read_text()
    assert page == recipe_page(), "run: python -m isotune.cli.recipe_page docs/recipe-keys.md"
    for name in (*Recipe.model_fields, *DataSettings.model_fields):
        assert name == "data" or f"| `{name}` |" in page
