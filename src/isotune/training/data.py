"""Rows for a task: columns checked and joined, labels numbered, validation rows held out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from isotune.errors import DataError, nearest
from isotune.training.recipe import DataSettings
from isotune.training.tasks.names import TASKS

if TYPE_CHECKING:
    import datasets

Row = dict[str, Any]
"""What a task's columns give: `text` and `label`, `text` alone, `prompt` and `completion`, `messages`, ..."""


@dataclass(frozen=True)
class Splits:
    """The rows of a run and, for a classification, the label names in the order of their numbers."""

    train: list[Row]
    validation: list[Row] = field(default_factory=list)
    test: list[Row] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    positive: str | None = None
    """Of two labels the one that F1 is of."""
    columns: dict[str, list[str]] = field(default_factory=dict, compare=False)
    """What each key of a row was read from, in the training rows."""


def load_splits(data: DataSettings, task: str, seed: int) -> Splits:
    """Read training, validation and test rows and check every one of them.

    Raises:
        DataError: A missing or empty file, an unknown column, a row without text, a single label, or a label in
            the validation or test rows that the training rows do not have.
    """
    from isotune.training.sources import open_source

    source = open_source(data.train, data.subset, data.quoting)
    if "train" not in source:
        raise DataError(f"{data.train} has no split 'train'; it has: {', '.join(source)}")
    columns = TASKS[task].columns(data, source["train"].column_names)
    train = read_rows(source["train"], data, task, data.train)
    labels = TASKS[task].labels(train, data)
    positive = TASKS[task].positive(train, labels, data)
    cut = _cut_tail if TASKS[task].is_one_document(train) else hold_out
    if isinstance(data.test, float):
        train, test = cut(train, data.test, seed)
    else:
        test = _named_split(data.test, source, data, task) if data.test else []
    if isinstance(data.validation, float):
        train, validation = cut(train, data.validation, seed)
    else:
        validation = _named_split(data.validation, source, data, task) if data.validation else []
    train = sample_rows(train, data.max_train_rows, seed)
    validation, test = (sample_rows(rows, data.max_eval_rows, seed) for rows in (validation, test))
    for name, rows in (("validation", validation), ("test", test)):
        TASKS[task].check(rows, labels, f"the {name} rows")
    train, validation, test = (_opened(rows) for rows in (train, validation, test))
    return Splits(train, validation, test, labels, positive, columns)


def sample_rows(rows: list[Row], most: int | None, seed: int) -> list[Row]:
    """At most so many of the rows, drawn by the seed; all where there is no limit."""
    if most is None or most >= len(rows):
        return rows
    return [rows[index] for index in _permutation(len(rows), seed)[:most]]


def load_rows(source: str, data: DataSettings, task: str) -> list[Row]:
    """The rows of one file (or split `test`, else `train`, of a source with several splits)."""
    return _opened(read_rows(_only_split(source, data), data, task, source))


def unanswered_rows(source: str, data: DataSettings, task: str, size: int) -> tuple[int, Iterator[list[Row]]]:
    """How many rows there are, and so many of them at a time; what is to be learnt may be missing.

    The first are read here, the others as they are taken. Raises DataError as `read_rows` does.
    """
    dataset = _only_split(source, data)
    count = len(dataset)

    def read(start: int) -> list[Row]:
        part = dataset.select(range(start, min(start + size, count)))
        return _opened(read_rows(part, data, task, source, unanswered=True, first=start + 1))

    head = read(0)
    return count, chain([head], (read(start) for start in range(size, count, size)))


def _only_split(source: str, data: DataSettings) -> datasets.Dataset:
    from isotune.training.sources import open_source

    splits = open_source(source, data.subset, data.quoting)
    return splits["test" if "test" in splits else next(iter(splits))]


def hold_out(rows: list[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Split off a seeded share of the rows: the same share of every class, and always one row left of each."""
    groups: dict[str, list[int]] = defaultdict(list)
    for index in _permutation(len(rows), seed):
        label = rows[index].get("label", "")
        groups[label if isinstance(label, str) else ""].append(index)
    held: set[int] = set()
    for members in groups.values():
        held.update(members[: min(round(fraction * len(members)), len(members) - 1)])
    if not held:
        raise DataError(
            f"{fraction} of {len(rows)} rows leaves none to hold out (data.validation, data.test); give a larger "
            "fraction, a file, or null for none"
        )
    kept = [row for index, row in enumerate(rows) if index not in held]
    return kept, [rows[index] for index in sorted(held)]


def _cut_tail(rows: list[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:  # noqa: ARG001
    """The last share of a single document, which has no rows to draw from."""
    text = rows[0]["text"]
    place = len(text) - round(fraction * len(text))
    return [{"text": text[:place]}], [{"text": text[place:]}]


def read_rows(
    dataset: datasets.Dataset,
    data: DataSettings,
    task: str,
    where: str,
    unanswered: bool = False,
    first: int = 1,
) -> list[Row]:
    """The columns that the task needs, every row checked; what takes long to decode is left for `_opened`.

    Args:
        dataset: The rows.
        data: The columns' names.
        task: The task's name.
        where: What the rows are called in messages.
        unanswered: Whether what is to be learnt may be missing.
        first: The number of the first row.

    Raises:
        DataError: An unknown column, or a row in which one of them is missing or blank.
    """
    if not len(dataset):
        raise DataError(f"{where}: there are no rows")
    kind, found = TASKS[task], dataset.column_names
    columns = kind.columns(data, found)
    if unanswered and not set(columns.get(kind.answer, ())) <= set(found):
        del columns[kind.answer]
    for key, names in columns.items():
        for name in names:
            _check_column(name, "text" if key == "pair" else key, found, where)
    cell = kind.open_cell if unanswered else kind.cell
    read: dict[str, list[Any]] = {}
    for key, names in columns.items():
        decode = partial(cell, key)
        if key in kind.slow:
            places = range(len(dataset))
            read[key] = [partial(_cell, dataset, names[0], place, decode, where, first) for place in places]
        else:
            read[key] = _cells(dataset, names, decode, data.separator, where, first)
    return [dict(zip(read, values, strict=True)) for values in zip(*read.values(), strict=True)]


def _check_column(name: str, key: str, found: list[str], where: str) -> None:
    if name not in found:
        raise DataError(
            f"{where}: no column {name!r} (data.{key}).{nearest(name, found)} Columns there: {', '.join(found)}"
        )


def _cells(
    dataset: datasets.Dataset, names: list[str], read: Callable[[Any], Any], separator: str, where: str, first: int
) -> list[Any]:
    """The cells of a column; of several, their texts joined."""
    parts: list[list[Any]] = []
    for name in names:
        parts.append([])
        for number, value in enumerate(dataset[name][:], start=first):
            parts[-1].append(_checked(value, read, f"{where}: row {number}", name))
    return parts[0] if len(parts) == 1 else [separator.join(values) for values in zip(*parts, strict=True)]


def _cell(
    dataset: datasets.Dataset, name: str, place: int, read: Callable[[Any], Any], where: str, first: int
) -> Any:
    """One cell of a column, and no other is decoded."""
    return _checked(dataset[name][place], read, f"{where}: row {first + place}", name)


def _checked(value: Any, read: Callable[[Any], Any], where: str, name: str) -> Any:
    try:
        return read(value)
    except ValueError as error:
        raise DataError(f"{where} has {error} in column {name!r} (rows counted from 1)") from None


def _opened(rows: list[Row]) -> list[Row]:
    """The rows with the cells that were left for later."""
    return [{key: cell() if isinstance(cell, partial) else cell for key, cell in row.items()} for row in rows]


def _named_split(name: str, source: dict[str, datasets.Dataset], data: DataSettings, task: str) -> list[Row]:
    """Rows of a split of the training source, or else of a source of its own."""
    if name in source:
        return read_rows(source[name], data, task, f"{data.train}, split {name}")
    return read_rows(_only_split(name, data), data, task, name)


def _permutation(count: int, seed: int) -> list[int]:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
