"""Recipes: YAML, flags and --set say the same thing, and survive being written down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from isotune.errors import IsotuneError
from isotune.recipes import parse_yaml
from isotune.training.arguments import precision_on, resolve_training, training_arguments
from isotune.training.folder import RunFolder
from isotune.training.recipe import DataSettings, Recipe, build_recipe

FLAGS: dict[str, Any] = {"model": "base", "data.train": "rows.csv", "output": "run"}


def test_later_sources_win_over_earlier_ones(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("model: base\nmethod: lora\ndata: {train: a.csv}\noutput: run\nseed: 1\n")
    recipe = build_recipe(file, {"seed": 2, "data.text": None}, ["seed=3", "method.rank=4"])
    assert recipe.seed == 3
    assert recipe.method == {"name": "lora", "rank": 4}
    assert recipe.data.text is None


def test_yaml_reads_numbers_and_words_as_people_mean_them() -> None:
    assert parse_yaml("{a: 1e-3, b: no, c: on, d: true, e: 7, f: 2024-01-01, g: .5}") == {
        "a": 1e-3, "b": "no", "c": "on", "d": True, "e": 7, "f": "2024-01-01", "g": 0.5,
    }  # fmt: skip


def test_a_recipe_is_the_same_after_a_round_trip(tmp_path: Path) -> None:
    recipe = build_recipe(None, FLAGS, ["training.learning_rate=1e-5", "overrides.query.rank=2"]).resolved()
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    assert build_recipe(file) == recipe
    assert yaml.safe_load(recipe.to_yaml())["output"].startswith("/")


@pytest.mark.parametrize("section", [Recipe, DataSettings])
def test_every_field_says_what_it_is(section: type[Any]) -> None:
    assert all(field.description for field in section.model_fields.values())


def test_training_has_our_defaults_under_the_recipes_own_values() -> None:
    recipe = build_recipe(None, FLAGS, ["training.num_train_epochs=2", "training.save_total_limit=1"])
    arguments = training_arguments(resolve_training(recipe, hint=0.004), "run")
    assert arguments.learning_rate == 0.004
    assert arguments.weight_decay == 0.0
    assert arguments.num_train_epochs == 2
    assert arguments.save_total_limit == 2


def test_a_field_that_the_recipe_holds_elsewhere_is_refused() -> None:
    with pytest.raises(IsotuneError, match=r"training\.output_dir is decided elsewhere: use output"):
        resolve_training(build_recipe(None, FLAGS, ["training.output_dir=x"]), 0.1)


def test_a_run_of_an_older_version_which_named_the_plain_columns_is_the_same_run(tmp_path: Path) -> None:
    recipe = build_recipe(None, {"model": "m", "data.train": "x", "output": str(tmp_path / "run")})
    folder = RunFolder(tmp_path / "run")
    folder.create(recipe)
    older = recipe.model_copy(update={"data": recipe.data.model_copy(update={"text": "text", "label": "label"})})
    folder.recipe_file.write_text(folder.recipe_file.read_text().split("\n")[0] + "\n" + older.to_yaml())
    assert folder.recipe().data.text == "text"
    folder.check_same(recipe)
    other = recipe.model_copy(update={"data": recipe.data.model_copy(update={"text": "sentence"})})
    with pytest.raises(IsotuneError, match=r"data\.text: None then, 'sentence' now"):
        folder.check_same(other)


def test_a_gpu_trains_in_bf16_unless_the_recipe_says_something_else() -> None:
    assert precision_on(True, True, {"learning_rate": 1e-3}) == {"bf16": True}
    for gpu, bf16, asked in (
        (False, False, {}),
        (True, False, {}),
        (True, True, {"fp16": True}),
        (True, True, {"bf16": False}),
    ):
        assert precision_on(gpu, bf16, asked) == {}
