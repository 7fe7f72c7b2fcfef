"""From a path or a hub id to `datasets.Dataset`s: files, folders of files, saved datasets, the hub."""

from __future__ import annotations

import csv
import glob
import gzip
import json
import logging
import re
import tempfile
import warnings
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import datasets

from isotune.errors import DataError, IsotuneWarning

_FORMATS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".txt": "text",
}
_IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
_SOUNDS = {".wav", ".flac", ".ogg", ".mp3"}
_SPLITS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
"""How files and folders of a split are called."""
Source = dict[str, datasets.Dataset]
"""Datasets by split name; a file alone is the split `train`."""


def open_source(source: str, subset: str | None = None, quoting: str = "auto") -> Source:
    """Read a file, a folder of files, a `save_to_disk` folder, or a dataset of the hub.

    Files are read into memory through a temporary cache, so nothing is left behind and nothing stale is used.
    `quoting` is that of `DataSettings`.

    Raises:
        DataError: There is no such file, it is empty or unreadable, or the hub cannot be reached.
    """
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what it has to say is in the error that it raises
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path, quoting)
    if path.is_file():
        return {"train": _file(path, quoting)}
    if path.is_absolute() or source.startswith(".") or source.count("/") > 1 or _format(path):
        raise DataError(f"no data file or folder at {source}")
    return _hub(source, subset)


def _folder(path: Path, quoting: str) -> Source:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        try:
            saved = datasets.load_from_disk(str(path), keep_in_memory=True)
        except Exception as error:
            raise DataError(f"{path}: not a readable datasets folder: {error}") from None
        found = dict(saved) if isinstance(saved, datasets.DatasetDict) else {"train": saved}
        return {str(name): _plain(split) for name, split in found.items()}
    files = sorted(file for file in path.iterdir() if file.is_file() and _format(file))
    if not files and any(file.suffix.lower() in _IMAGES for file in path.rglob("*")):
        return _images(path)
    if not files and (sounds := sorted(file for file in path.rglob("*") if file.suffix.lower() in _SOUNDS)):
        return _sounds(path, sounds)
    if not files:
        raise DataError(
            f"{path}: no data file in this folder; known endings: {', '.join(_FORMATS)} (and .gz), and images or "
            "sounds in folders named for their labels"
        )
    splits = {_split_of(file): file for file in files}
    if None not in splits and len(splits) == len(files):
        return {str(name): _file(file, quoting) for name, file in splits.items()}
    return {"train": datasets.concatenate_datasets([_file(file, quoting) for file in files])}


def _images(path: Path) -> Source:
    """A folder of folders of images, named for their labels; the folders above may be train, validation and test."""
    # Left to find them by itself, `datasets` walks through all files once for each of some fifty patterns.
    files: dict[str, list[str]] = {}
    for folder in sorted(entry for entry in path.iterdir() if entry.is_dir()):
        for split in {_SPLITS[word] for word in re.split(r"[\W_]+", folder.name.lower()) if word in _SPLITS}:
            files.setdefault(split, []).append(f"{glob.escape(folder.name)}/**")
    if "train" not in files:
        files = {"train": ["**"]}
    with tempfile.TemporaryDirectory(prefix="isotune-") as cache:
        try:
            found = datasets.load_dataset(
                "imagefolder", data_dir=str(path), data_files=files, cache_dir=cache, keep_in_memory=True
            )
        except Exception as error:  # whatever its readers raise
            raise DataError(f"{path}: the images cannot be read: {error.__cause__ or error}") from None
    return {str(name): _plain(split) for name, split in found.items()}


def _sounds(path: Path, files: list[Path]) -> Source:
    """The same with sounds, which `datasets` reads by torchcodec alone; without any folders they have no labels."""
    rows: dict[str, dict[str, list[str]]] = {}
    labelled = any(file.parent != path for file in files)
    for file in files:
        *above, label = file.relative_to(path).parent.parts or ("",)
        if labelled and (not label or label.lower() in _SPLITS):
            raise DataError(f"{file} is in no folder named for its label, as other sounds in {path} are")
        split = rows.setdefault(_SPLITS.get(above[0].lower() if above else "", "train"), {"audio": [], "label": []})
        split["audio"].append(str(file))
        split["label"].append(label)
    return {
        name: datasets.Dataset.from_dict(split if labelled else {"audio": split["audio"]})
        for name, split in rows.items()
    }


def _split_of(file: Path) -> str | None:
    return _SPLITS.get(file.name.split(".")[0].lower())


def _format(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return _FORMATS.get(suffixes[-1]) if suffixes else None


def _file(path: Path, quoting: str) -> datasets.Dataset:
    kind = _format(path) or "text"
    try:
        lines = _first_lines(path) if kind != "parquet" else ["parquet"]
        if not lines:
            raise DataError(f"{path}: the file is empty")
        if kind == "csv" and len(lines) < 2:
            raise DataError(f"{path}: the file has a header and no rows")
        if kind == "text" and _is_json_object(lines[0]):
            kind = "json"
        layout = _layout(path, quoting) if kind == "csv" else None
        options = layout.options() if layout else {}
        if kind == "text":
            options = {"sample_by": "document"}
        dataset = _build(kind, path, options)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the file cannot be read: {error}") from None
    if layout is not None and layout.rows != len(dataset):
        raise DataError(
            f"{path}: {layout.rows} rows are in the file and {len(dataset)} were read; say how it is quoted, with "
            "data.quoting: minimal or none"
        )
    if not len(dataset):
        raise DataError(f"{path}: the file has no rows")
    return _plain(dataset) if kind == "parquet" else dataset


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


class _Layout(NamedTuple):
    """How a file of separated values is to be read, and how many rows it has."""

    delimiter: str
    columns: list[str]
    quoted: bool
    rows: int

    def options(self) -> dict[str, Any]:
        """For the reader. Every column is read as the text that stands there: "007" and "None" stay what they are."""
        return {
            "sep": self.delimiter,
            "features": datasets.Features({name: datasets.Value("string") for name in self.columns}),
            "na_filter": False,
            "encoding": "utf-8-sig",
            "quoting": csv.QUOTE_MINIMAL if self.quoted else csv.QUOTE_NONE,
        }


def _layout(path: Path, quoting: str) -> _Layout:
    """The layout of a file, found out or, where `quoting` says so, given.

    Quotes that are characters like any others have to be read as such: one at the start of a field would swallow all
    up to the next one, lines and all.
    """
    tabs = ".tsv" in [suffix.lower() for suffix in path.suffixes]
    delimiter = "\t" if tabs else ","
    with _open(path) as file:
        text = file.read()
    plain = _records(text, delimiter, csv.QUOTE_NONE)
    if '"' not in text:
        return _Layout(delimiter, plain[0], True, len(plain) - 1)
    enclosed = _records(text, delimiter, csv.QUOTE_MINIMAL)
    quoted = quoting == "minimal" or (quoting == "auto" and not _plain_quotes(plain, enclosed))
    records = enclosed if quoted else plain
    if not quoted and quoting == "auto":
        _tell(f"{path}: quotes are read as characters like others (data.quoting: minimal would read them otherwise)")
    if quoted and (spanning := len(plain) - len(enclosed)) > 0:
        _tell(
            f"{path}: {len(enclosed) - 1} rows on {len(plain) - 1} lines: {spanning} line breaks are within quotes; "
            "if they are not meant to be, set data.quoting: none"
        )
    return _Layout(delimiter, records[0], quoted, len(records) - 1)


def _records(text: str, delimiter: str, quoting: int) -> list[list[str]]:
    """The rows, the header first, without blank lines."""
    csv.field_size_limit(len(text) + 1)
    lines = StringIO(text, newline="")
    return [row for row in csv.reader(lines, delimiter=delimiter, quoting=quoting) if row]  # type: ignore[arg-type]


def _plain_quotes(plain: list[list[str]], enclosed: list[list[str]]) -> bool:
    """Whether the quotes in a file enclose nothing: without them every line is a row, and some is left open."""
    width = len(plain[0])
    if any(len(row) != width for row in plain):
        return False
    fields = [field for row in plain for field in row if field.startswith('"')]
    open_ended = any(
        len(field) < 2 or not field.endswith('"') or '"' in field[1:-1].replace('""', "") for field in fields
    )
    return len(enclosed) < len(plain) or open_ended


def _tell(message: str) -> None:
    warnings.warn(message, IsotuneWarning, stacklevel=2)


def _hub(source: str, subset: str | None) -> Source:
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        found = datasets.load_dataset(source, subset)
    except Exception as error:  # offline, unknown id, gated, or a script: one message for all
        raise DataError(
            f"no data file or folder at {source}, and the hub gave no dataset of that name: {error}"
        ) from None
    return {str(name): _plain(split) for name, split in found.items()}


def _plain(dataset: datasets.Dataset) -> datasets.Dataset:
    """Class numbers become their names, and sounds stay as they are stored: `datasets` would want torchcodec."""
    for name, feature in dataset.features.items():
        if isinstance(feature, datasets.Audio):
            dataset = dataset.cast_column(name, datasets.Audio(decode=False))
    return _with_label_names(dataset)


def _with_label_names(dataset: datasets.Dataset) -> datasets.Dataset:
    """Class numbers become their names."""
    for name, feature in list(dataset.features.items()):
        if isinstance(feature, datasets.ClassLabel):
            names = [None if value is None or value < 0 else feature.int2str(value) for value in dataset[name][:]]
            dataset = dataset.remove_columns(name).add_column(name, names)
    return dataset
