"""`isotune chat` answers line by line, with the adapter and without."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import make_llama, write_jsonl

from isotune.training.recipe import build_recipe
from isotune.training.run import train

Command = Callable[..., int]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    rows = write_jsonl(folder / "rows.jsonl", [{"prompt": "the cat", "completion": "sees a dog"}] * 32)
    flags: dict[str, Any] = {
        "model": str(make_llama(folder / "base")), "task": "causal-lm", "data.train": str(rows),
        "data.validation": None, "output": str(folder / "run"), "method.name": "lora", "method.rank": 8,
        "targets": "all-linear", "train_also": ["lm_head"], "training.learning_rate": 0.02,
        "training.num_train_epochs": 20, "training.report_to": "none",
    }  # fmt: skip
    return train(build_recipe(None, flags), progress=False).output


def test_lines_are_answered_with_the_adapter_and_without(
    command: Command, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["the cat", "", "/base", "the cat", "/base", "the cat", "/reset", "/help", "/quit", "the cat"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    assert command("chat", run, "--max-new-tokens", 8) == 0
    out, err = capsys.readouterr()
    adapted, bare, again = out.splitlines()
    assert adapted == again == "sees a dog"
    assert bare != adapted
    assert "the adapter is off" in err
    assert "the adapter is on again" in err
    assert "/base, /reset and /quit are all there is" in err


def test_a_model_by_itself_has_no_adapter_to_switch(
    command: Command, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("/base\nthe cat\n"))
    assert command("chat", run.parent / "base", "--max-new-tokens", 2, "--temperature", 1) == 0
    assert "there is no adapter" in capsys.readouterr().err


def test_what_cannot_chat_is_one_message(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("chat", tmp_path / "nowhere") == 2
    assert "no model folder at" in capsys.readouterr().err
