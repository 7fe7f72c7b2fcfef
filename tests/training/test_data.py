"""Data files of every kind give the same rows; splits are seeded and keep the labels' shares."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import datasets
import pytest
from tiny import sentences, write_jsonl

from isotune.errors import DataError
from isotune.training.data import Splits, hold_out, load_rows, load_splits
from isotune.training.recipe import DataSettings

ROWS = [{"text": '007, "NA"', "label": "None"}, {"text": "x\ny", "label": "1"}, {"text": "é", "label": "01"}]


def table(separator: str) -> str:
    quoted = [",".join(ROWS[0])] + ["#".join('"' + v.replace('"', '""') + '"' for v in r.values()) for r in ROWS]
    return "\n".join(quoted).replace(",", separator, 1).replace("#", separator) + "\n"


def write(path: Path, kind: str) -> Path:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    if kind in ("csv", "tsv"):
        path.write_text(table("," if kind == "csv" else "\t"), encoding="utf-8")
    elif kind == "csv.gz":
        path.write_bytes(gzip.compress(table(",").encode()))
    elif kind in ("jsonl", "txt"):
        path.write_text(lines, encoding="utf-8")
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "json":
        path.write_text(json.dumps(ROWS), encoding="utf-8")
    elif kind == "parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    else:
        datasets.Dataset.from_list(ROWS).save_to_disk(path)
    return path


@pytest.mark.filterwarnings("ignore:.*line breaks are within quotes")
@pytest.mark.parametrize("kind", ["csv", "tsv", "csv.gz", "jsonl", "txt", "jsonl.gz", "json", "parquet", "saved"])
def test_every_kind_of_file_gives_the_text_that_stands_in_it(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"rows.{kind}", kind)
    assert load_rows(str(path), DataSettings(train="-"), "classification") == ROWS


def test_a_folder_with_a_file_for_each_split_names_them(tmp_path: Path) -> None:
    for name, seed in (("train", 1), ("dev", 2), ("test", 3)):
        write_jsonl(tmp_path / f"{name}.jsonl", sentences(6 + seed, seed))
    data = DataSettings(train=str(tmp_path), validation="validation", test="test")
    splits = load_splits(data, "classification", 0)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [7, 8, 9]


def test_the_held_out_share_is_seeded_and_the_same_for_every_label() -> None:
    rows = [{"text": str(n), "label": "a" if n % 4 else "b"} for n in range(80)]
    kept, held = hold_out(rows, 0.25, seed=1)
    assert Counter(row["label"] for row in held) == {"a": 15, "b": 5}
    assert hold_out(rows, 0.25, seed=1) == (kept, held)
    assert hold_out(rows, 0.25, seed=2) != (kept, held)
    assert len(kept) + len(held) == 80


def test_one_long_document_is_cut_at_its_end_for_validation(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("0123456789" * 10)
    splits = load_splits(DataSettings(train=str(tmp_path / "book.txt"), validation=0.2), "causal-lm", 0)
    assert splits == Splits([{"text": "0123456789" * 8}], [{"text": "0123456789" * 2}])


def test_number_labels_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "n.jsonl", [{"text": "t", "label": n % 12} for n in range(36)])
    splits = load_splits(DataSettings(train=str(path), validation=None), "classification", 0)
    assert splits.labels == [str(n) for n in range(12)]


def test_several_columns_are_joined(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "n.jsonl", [{"a": "x", "b": "y"}])
    data = DataSettings(train=str(path), text=["a", "b"], separator=" | ")
    assert load_rows(str(path), data, "causal-lm") == [{"text": "x | y"}]


def test_a_missing_column_lists_those_that_are_there(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "n.jsonl", sentences(4, 0))
    with pytest.raises(DataError, match=r"no column 'lable' .*Did you mean 'label'\? Columns there: text, label"):
        load_rows(str(path), DataSettings(train="-", label="lable"), "classification")


def test_a_share_of_the_rows_is_held_out_for_the_test(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "n.jsonl", sentences(100, 0))
    data = DataSettings(train=str(path), test="0.2", validation=0.25)  # type: ignore[arg-type]
    splits = load_splits(data, "classification", 1)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [60, 20, 20]
    assert Counter(row["label"] for row in splits.test) == {"animal": 10, "plant": 10}
    again = load_splits(data, "classification", 1)
    assert again == splits
    assert load_splits(data, "classification", 2) != splits
    (tmp_path / "book.txt").write_text("0123456789" * 10)
    data = DataSettings(train=str(tmp_path / "book.txt"), validation=None, test=0.2)
    assert load_splits(data, "causal-lm", 0).test == [{"text": "0123456789" * 2}]
