"""From a path or a hub id to `datasets.Dataset`s: files, folders of files, saved datasets, the hub."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import tempfile
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import IO, Any

import datasets

from isotune.errors import DataError

_FORMATS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".txt": "text",
}
Source = dict[str, datasets.Dataset]
"""Datasets by split name; a file alone is the split `train`."""


def open_source(source: str, subset: str | None = None) -> Source:
    """Read a file, a folder of files, a `save_to_disk` folder, or a dataset of the hub.

    Files are read into memory through a temporary cache, so nothing is left behind and nothing stale is used.

    Raises:
        DataError: There is no such file, it is empty or unreadable, or the hub cannot be reached.
    """
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return {"train": _file(path)}
    if path.is_absolute() or source.startswith(".") or source.count("/") > 1 or _format(path):
        raise DataError(f"no data file or folder at {source}")
    return _hub(source, subset)


def _folder(path: Path) -> Source:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        try:
            saved = datasets.load_from_disk(str(path), keep_in_memory=True)
        except Exception as error:
            raise DataError(f"{path}: not a readable datasets folder: {error}") from None
        found = dict(saved) if isinstance(saved, datasets.DatasetDict) else {"train": saved}
        return {str(name): _with_label_names(split) for name, split in found.items()}
    files = sorted(file for file in path.iterdir() if file.is_file() and _format(file))
    if not files:
        raise DataError(f"{path}: no data file in this folder; known endings: {', '.join(_FORMATS)} (and .gz)")
    splits = {_split_of(file): file for file in files}
    if None not in splits and len(splits) == len(files):
        return {str(name): _file(file) for name, file in splits.items()}
    return {"train": datasets.concatenate_datasets([_file(file) for file in files])}


def _split_of(file: Path) -> str | None:
    stem = file.name.split(".")[0].lower()
    return {"train": "train", "validation": "validation", "valid": "validation", "val": "validation",
            "dev": "validation", "test": "test"}.get(stem)  # fmt: skip


def _format(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return _FORMATS.get(suffixes[-1]) if suffixes else None


def _file(path: Path) -> datasets.Dataset:
    kind = _format(path) or "text"
    try:
        lines = _first_lines(path) if kind != "parquet" else ["parquet"]
        if not lines:
            raise DataError(f"{path}: the file is empty")
        if kind == "csv" and len(lines) < 2:
            raise DataError(f"{path}: the file has a header and no rows")
        if kind == "text" and _is_json_object(lines[0]):
            kind = "json"
        options = _csv_options(lines[0], path) if kind == "csv" else {}
        if kind == "text":
            options = {"sample_by": "document"}
        dataset = _build(kind, path, options)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the file cannot be read: {error}") from None
    if not len(dataset):
        raise DataError(f"{path}: the file has no rows")
    return dataset


def _build(kind: str, path: Path, options: dict[str, Any]) -> datasets.Dataset:
    with tempfile.TemporaryDirectory(prefix="isotune-") as cache:
        try:
            return datasets.load_dataset(
                kind, data_files=[str(path)], split="train", cache_dir=cache, keep_in_memory=True, **options
            )
        except Exception as error:  # the builders raise whatever their parser does
            cause = error.__cause__ or error
            raise DataError(f"{path}: the file cannot be read as {kind}: {cause}") from None


def _open(path: Path) -> IO[str]:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return open(path, encoding="utf-8-sig", newline="")


def _first_lines(path: Path) -> list[str]:
    """The first two lines that are not blank, or as many as there are."""
    with _open(path) as lines:
        return list(islice((line for line in lines if line.strip()), 2))


def _is_json_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _csv_options(header: str, path: Path) -> dict[str, Any]:
    """Every column is read as the text that stands there: "007" and "None" stay what they are."""
    tabs = ".tsv" in [suffix.lower() for suffix in path.suffixes]
    delimiter = "\t" if tabs else ","
    columns: Iterable[str] = next(csv.reader([header], delimiter=delimiter))
    features = datasets.Features({name: datasets.Value("string") for name in columns})
    return {
        "sep": delimiter,
        "features": features,
        "na_filter": False,
        "encoding": "utf-8-sig",
    }


def _hub(source: str, subset: str | None) -> Source:
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        found = datasets.load_dataset(source, subset)
    except Exception as error:  # offline, unknown id, gated, or a script: one message for all
        raise DataError(
            f"no data file or folder at {source}, and the hub gave no dataset of that name: {error}"
        ) from None
    return {str(name): _with_label_names(split) for name, split in found.items()}


def _with_label_names(dataset: datasets.Dataset) -> datasets.Dataset:
    """Class numbers become their names."""
    for name, feature in list(dataset.features.items()):
        if isinstance(feature, datasets.ClassLabel):
            names = [None if value is None or value < 0 else feature.int2str(value) for value in dataset[name][:]]
            dataset = dataset.remove_columns(name).add_column(name, names)
    return dataset
