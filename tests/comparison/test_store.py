"""Results on disk: whole lines survive any crash, and whatever is wrong is said in one message."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from isotune.comparison.recipe import ComparisonRecipe, build_comparison
from isotune.comparison.results import Line
from isotune.comparison.store import Store
from isotune.errors import IsotuneError


def recipe(output: Path, **compare: Any) -> ComparisonRecipe:
    flags = {"model": "minilm", "data.train": "train.csv", "data.test": "test.csv", "output": str(output)}
    return build_comparison(flags=flags | {f"compare.{key}": value for key, value in compare.items()})


def line(unit: str, **metrics: float) -> Line:
    return Line(
        unit=unit, kind="trial", method="lora", budget=1000, options={"rank": 4}, parameters=1024,
        learning_rate=1e-3, seed=0, status="done", metrics=metrics, seconds=1.0,
    )  # fmt: skip


def test_lines_come_back_and_the_last_of_a_unit_counts(tmp_path: Path) -> None:
    with Store(tmp_path / "c").open(recipe(tmp_path / "c")) as store:
        for one in (line("a", loss=1.0), line("b", loss=2.0), line("a", loss=3.0)):
            store.add(one)
    found = Store(tmp_path / "c").lines()
    assert {name: one.metrics["loss"] for name, one in found.items()} == {"a": 3.0, "b": 2.0}


def test_the_index_answers_queries_and_is_made_anew(tmp_path: Path) -> None:
    made = recipe(tmp_path / "c")
    with Store(tmp_path / "c").open(made) as store:
        store.add(line("a", loss=1.0, accuracy=0.5))
    query = "select method, value from results join metrics using (unit) where name = 'accuracy'"
    for damaged in (False, True):
        if damaged:
            store.index_file.write_bytes(b"no database")
            Store(tmp_path / "c").open(made).close()
        with closing(sqlite3.connect(store.index_file)) as index:
            assert index.execute(query).fetchall() == [("lora", 0.5)]


def test_a_line_that_a_crash_cut_short_is_dropped_and_the_next_one_whole(tmp_path: Path) -> None:
    made = recipe(tmp_path / "c")
    with Store(tmp_path / "c").open(made) as store:
        store.add(line("a"))
    with open(store.results_file, "a") as file:
        file.write('{"unit": "b", "kin')
    assert list(Store(tmp_path / "c").lines()) == ["a"]
    with Store(tmp_path / "c").open(made) as store:
        store.add(line("c"))
    assert [json.loads(text)["unit"] for text in store.results_file.read_text().splitlines()] == ["a", "c"]


def test_a_foreign_line_is_named(tmp_path: Path) -> None:
    with Store(tmp_path / "c").open(recipe(tmp_path / "c")) as store:
        store.add(line("a"))
    store.results_file.write_text(store.results_file.read_text() + "[1, 2]\n")
    with pytest.raises(IsotuneError, match=r"results\.jsonl, line 2, is no result"):
        store.lines()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    made = recipe(tmp_path / "c")
    with Store(tmp_path / "c").open(made), pytest.raises(IsotuneError, match="is in use"):
        Store(tmp_path / "c").open(made)
    Store(tmp_path / "c").open(made).close()


def test_methods_budgets_seeds_and_trials_may_grow_and_nothing_else_change(tmp_path: Path) -> None:
    Store(tmp_path / "c").open(recipe(tmp_path / "c")).close()
    store = Store(tmp_path / "c")
    store.check(recipe(tmp_path / "c", methods="hra,oft", budgets=["40k"], seeds=5, trials=9, baseline="oft"))
    with pytest.raises(IsotuneError, match=r"compare\.span: \[0\.1, 10\.0\] then, \[1\.0, 2\.0\] now"):
        store.check(recipe(tmp_path / "c", span=[1, 2]))


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(IsotuneError, match="holds no comparison"):
        Store(tmp_path).check(recipe(tmp_path))
    with pytest.raises(IsotuneError, match="holds no comparison"):
        Store(tmp_path).recipe()


def test_a_comparison_of_an_older_version_which_named_the_plain_columns_goes_on(tmp_path: Path) -> None:
    made = recipe(tmp_path / "c", forgetting={"train": "other.csv"})
    with Store(tmp_path / "c").open(made):
        pass
    stored = Store(tmp_path / "c").recipe_file
    older = stored.read_text().replace("text: null", "text: text").replace("label: null", "label: label")
    assert older.count("text: text") == 2  # of the data, and of what was forgotten
    stored.write_text(older)
    Store(tmp_path / "c").check(made)
    with pytest.raises(IsotuneError, match="holds a comparison of another kind"):
        Store(tmp_path / "c").check(made.model_copy(update={"targets": "mlp"}))
