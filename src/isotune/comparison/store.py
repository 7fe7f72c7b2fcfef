"""A comparison's results on disk: one JSON object a line, and an SQLite index over them.

- comparison.yaml: the resolved recipe; its first line marks the folder as ours
- results.jsonl: a line for each finished unit, appended and flushed; the last line of a unit counts
- index.sqlite: the same for queries, made anew from the lines whenever a comparison goes on
- runs/: the units' own folders
- summary.json: what `summarise` makes of it all
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import IO, Any

from isotune.checkpoint.files import write_atomically
from isotune.comparison.recipe import ComparisonRecipe, build_comparison
from isotune.comparison.results import Line
from isotune.errors import IsotuneError
from isotune.locks import lock
from isotune.training.recipe import with_plain_columns

MARK = "# A resolved isotune comparison: `isotune compare` goes on with it, `isotune report` shows it.\n"
_EXTENDABLE = ("methods", "budgets", "seeds", "trials", "baseline", "full", "frozen", "cost_steps")
_COLUMNS = ("unit", "kind", "method", "budget", "parameters", "learning_rate", "seed", "status", "seconds", "run")


class Store:
    """The folder of a comparison, opened by one process at a time for writing (a context manager)."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe_file = self.path / "comparison.yaml"
        self.results_file = self.path / "results.jsonl"
        self.summary_file = self.path / "summary.json"
        self.index_file = self.path / "index.sqlite"
        self._opened: IO[str] | None = None

    def is_comparison(self) -> bool:
        """Whether the folder holds a comparison's recipe."""
        try:
            with open(self.recipe_file, encoding="utf-8") as file:
                return file.readline() == MARK
        except (OSError, UnicodeDecodeError):
            return False

    def recipe(self) -> ComparisonRecipe:
        """The recipe it was last run with. Raises IsotuneError where there is none."""
        if not self.is_comparison():
            raise IsotuneError(f"{self.path} holds no comparison: there is no {self.recipe_file.name} of isotune's")
        return build_comparison(self.recipe_file)

    def check(self, recipe: ComparisonRecipe) -> None:
        """Raise IsotuneError where the comparison could not start, or go on, in this folder; writes nothing."""
        if not self.is_comparison():
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise IsotuneError(
                    f"output {self.path} exists, is not empty, and holds no comparison; choose another folder"
                )
            return
        before, now = (_fixed(one) for one in (self.recipe(), recipe))
        changed = [key for key in now if before[key] != now[key]]
        if changed:
            listed = "; ".join(f"{key}: {before[key]!r} then, {now[key]!r} now" for key in changed)
            raise IsotuneError(
                f"{self.path} holds a comparison of another kind ({listed}); only the methods, budgets, seeds and "
                "trials of a comparison can change: choose another output"
            )

    def open(self, recipe: ComparisonRecipe) -> Store:
        """Begin, or go on. Raises IsotuneError where another process has it open, or it cannot be written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._opened = open(self.results_file, "a+", encoding="utf-8")  # noqa: SIM115 (closed by `close`)
            lock(self._opened)
        except BlockingIOError:
            self.close()
            raise IsotuneError(f"{self.path} is in use: another isotune compare is running there") from None
        except OSError as error:
            raise IsotuneError(f"output {self.path} cannot be written: {error.strerror}") from None
        write_atomically(self.recipe_file, MARK + recipe.to_yaml())
        self._cut_torn_line()
        self._index(self.lines().values())
        return self

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes have it."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def lines(self) -> dict[str, Line]:
        """The last line of each unit, by its name. Raises IsotuneError for a line that is none of ours."""
        try:
            text = self.results_file.read_text(encoding="utf-8")
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError) as error:
            raise IsotuneError(f"{self.results_file} cannot be read: {error}") from None
        found: dict[str, Line] = {}
        whole = text.splitlines() if text.endswith("\n") else text.splitlines()[:-1]  # a write that was cut short
        for number, line in enumerate(whole, 1):
            try:
                value = Line.model_validate(json.loads(line))
                found[value.unit] = value
            except ValueError:
                raise IsotuneError(
                    f"{self.results_file}, line {number}, is no result of isotune compare; remove the line, and the "
                    "unit will be run again"
                ) from None
        return found

    def add(self, line: Line) -> None:
        """Append a finished unit; it is on the disk when this returns."""
        assert self._opened is not None
        self._opened.write(json.dumps(line.model_dump()) + "\n")
        self._opened.flush()
        os.fsync(self._opened.fileno())
        with closing(sqlite3.connect(self.index_file)) as index, index:
            _insert(index, line)

    def _cut_torn_line(self) -> None:
        """Remove the end of a line whose writing a crash cut short."""
        assert self._opened is not None
        data = self.results_file.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(self.results_file, whole)

    def _index(self, lines: Iterable[Line]) -> None:
        self.index_file.unlink(missing_ok=True)
        with closing(sqlite3.connect(self.index_file)) as index, index:
            index.execute(f"create table results ({', '.join(_COLUMNS)}, options, error, primary key (unit))")
            index.execute("create table metrics (unit, name, value, primary key (unit, name))")
            for line in lines:
                _insert(index, line)


def _insert(index: sqlite3.Connection, line: Line) -> None:
    row = [*(getattr(line, name) for name in _COLUMNS), json.dumps(line.options), line.error]
    index.execute(f"insert or replace into results values ({', '.join('?' * len(row))})", row)
    index.execute("delete from metrics where unit = ?", [line.unit])
    index.executemany("insert into metrics values (?, ?, ?)", [(line.unit, *item) for item in line.metrics.items()])


def _fixed(recipe: ComparisonRecipe) -> dict[str, Any]:
    """What may not change between two starts, flat enough to be compared and named."""
    fields = recipe.model_dump(mode="json", exclude={"output", "method", "compare"})
    section = recipe.compare.model_dump(mode="json", exclude=set(_EXTENDABLE))
    return with_plain_columns({**fields, **{f"compare.{key}": value for key, value in section.items()}})
