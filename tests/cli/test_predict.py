"""`isotune predict`: lines on standard output or in a file, and mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import environment, write_jsonl


def test_without_an_output_the_lines_are_all_that_is_printed(
    command: Callable[..., int], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_jsonl(tmp_path / "x.jsonl", [{"say": "the old cat"}, {"say": "a fir"}])
    assert command("predict", finished, data, "--text", "say", "--probabilities") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["text"] for line in lines] == ["the old cat", "a fir"]
    assert all(line["probabilities"].keys() == {"animal", "plant"} for line in lines)


def test_a_file_is_written_and_its_rows_are_told(
    command: Callable[..., int], finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_jsonl(tmp_path / "x.jsonl", [{"text": "the old cat"}] * 3)
    table = tmp_path / "told.csv"
    assert command("predict", finished, data, "--output", table, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"rows": 3, "output": str(table)}
    assert [line.split(",")[0] for line in table.read_text().splitlines()] == ["text", *["the old cat"] * 3]


def test_a_reader_that_has_seen_enough_ends_it_without_complaint(finished: Path, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "x.jsonl", [{"text": "the old cat " * 40}] * 2000)
    process = subprocess.Popen(
        [sys.executable, "-m", "isotune.cli", "predict", str(finished), str(data)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(),
    )  # fmt: skip
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline())["prediction"] in ("animal", "plant")
        process.stdout.close()
        said = process.stderr.read().decode()
    assert process.returncode == 0, said
    assert "Traceback" not in said
    assert "BrokenPipe" not in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "x.jsonl"], "no run or adapter folder at nowhere"),
        (["{run}", "./missing.jsonl"], "no data file or folder at ./missing.jsonl"),
        (["{run}", "{data}", "--text", "txt"], "no column 'txt'"),
        (["{run}", "{data}", "--output", "x.xlsx"], "name a .csv or a .jsonl file"),
    ],
)
def test_a_mistake_gives_one_message_and_exit_code_2(
    command: Callable[..., int],
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    data = write_jsonl(tmp_path / "x.jsonl", [{"text": "the old cat"}])
    assert command("predict", *[argument.format(run=finished, data=data) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert out == ""
