"""Quotes in CSV and TSV: no row is lost in silence, whether they enclose fields or are characters like others."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path

import pytest

from isotune.errors import IsotuneWarning
from isotune.training.sources import open_source

MESSAGES = [
    ("ham", '"hello there'),
    ("spam", "buy now"),
    ("ham", 'see "you" later'),
    ("spam", 'more" stuff'),
    ("ham", "ok then"),
]


def written(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def read(path: Path, quoting: str = "auto") -> list[tuple[str, str]]:
    found = open_source(str(path), quoting=quoting)["train"]
    return list(zip(found["label"][:], found["text"][:], strict=True))


def test_a_quote_that_opens_nothing_swallows_no_line(tmp_path: Path) -> None:
    file = written(tmp_path / "sms.tsv", ["label\ttext", *("\t".join(row) for row in MESSAGES)])
    with pytest.warns(IsotuneWarning, match="quotes are read as characters like others"):
        assert read(file) == MESSAGES
    assert read(file, "none") == MESSAGES


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_quotes_that_enclose_fields_are_taken_off(tmp_path: Path, delimiter: str) -> None:
    rows = [("a", "hello, there"), ("b", 'she said "no"'), ("a", "plain"), ("b", "a\ttab")]
    file = tmp_path / ("x.csv" if delimiter == "," else "x.tsv")
    with open(file, "w", newline="", encoding="utf-8") as out:
        csv.writer(out, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows([("label", "text"), *rows])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(file) == rows


def test_a_row_that_spans_lines_is_read_and_told(tmp_path: Path) -> None:
    file = written(tmp_path / "x.csv", ["label,text", 'a,"two', 'lines"', "b,one"])
    with pytest.warns(IsotuneWarning, match=r"2 rows on 3 lines: 1 line breaks .*data.quoting: none"):
        assert read(file) == [("a", "two\nlines"), ("b", "one")]
