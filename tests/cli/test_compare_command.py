"""`isotune compare`: the plan, the table, the JSON, and one message for each mistake."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest


def arguments(bert: Path, rows: Path, output: Path) -> list[object]:
    sets = {
        "model": bert, "data.train": rows / "train.jsonl", "data.test": rows / "test.jsonl", "data.max_length": 16,
        "targets": "query-value", "training.max_steps": 1, "compare.full": "false", "compare.cost_steps": 0,
    }  # fmt: skip
    flags = ["--methods", "hra,lora", "--budget", "300", "--trials", 1, "--seeds", 2, "--output", output]
    return ["compare", *flags, *(word for key, value in sets.items() for word in ("--set", f"{key}={value}"))]


def test_the_plan_shows_sizes_and_writes_nothing(
    command: Callable[..., int], bert: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(bert, rows, tmp_path / "c")
    assert command(*given, "--plan") == 0
    shown = capsys.readouterr().out
    assert "8 runs; of each row 1 learning rates, then 2 seeds" in shown
    assert "256 (far)" in shown
    assert command(*given, "--plan", "--json") == 0
    cells = json.loads(capsys.readouterr().out)
    assert [(cell["label"], cell["parameters"], cell["far"]) for cell in cells] == [
        ("hra", 256, True),
        ("lora", 256, True),
        ("frozen", 0, False),
    ]
    assert not (tmp_path / "c").exists()


def test_a_table_for_people_and_json_for_machines(
    command: Callable[..., int], bert: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments(bert, rows, tmp_path / "c")
    assert command(*given) == 0
    out, err = capsys.readouterr()
    assert "accuracy on the test rows: mean and 95 % t-interval over seeds" in out
    assert all(word in out for word in ("minus lora", "hra", "frozen", "±"))
    assert "8/8 " in err
    assert command(*given, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "c" / "summary.json").read_text())
    assert found["units"]["done"] == 8


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--set", "compare.methods=[hra, nosuch]"], "unknown method 'nosuch'"),
        (["--budget", "lots"], "'lots' is no number of parameters"),
        (["--set", "data.test=null"], "data.test is needed"),
        (["--baseline", "oft"], "none of the methods"),
        (["--set", "data.train=missing.jsonl"], "no data file"),
        (["--ray", "127.0.0.1:1"], "Ray"),
    ],
)
def test_mistakes_end_in_one_message_and_leave_nothing(
    more: list[str],
    message: str,
    command: Callable[..., int],
    bert: Path,
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "--ray" in more:
        pytest.importorskip("ray")
    assert command(*arguments(bert, rows, tmp_path / "c"), *more) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "c" / "runs").exists()
