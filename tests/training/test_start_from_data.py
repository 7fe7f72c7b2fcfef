"""`isotune train` with a method that starts from data: it sees training rows first, and only at the very start."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import start_slowly
from tiny import assert_same_bits, tensors, write_recipe

from isotune.training import build_recipe, train

CORDA = {"name": "corda", "rank": 2}


def recipe(path: Path, model: Path, rows: Path, output: Path, method: dict[str, Any], **training: Any) -> Path:
    written = json.loads(write_recipe(path, model, rows, output, **training).read_text())
    path.write_text(json.dumps({**written, "method": method}))
    return path


def test_the_start_comes_from_training_rows_and_repeats_with_the_seed(
    bert: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    starts = {}
    for name, method in {"one": CORDA, "same": CORDA, "pissa": {"name": "pissa", "rank": 2}}.items():
        file = recipe(tmp_path / f"{name}.yaml", bert, rows, tmp_path / name, method, max_steps=2)
        starts[name] = tensors(train(build_recipe(file, {}, [])).adapter)
    assert "corda starts from 44 training rows" in capsys.readouterr().err
    key = next(key for key in starts["one"] if key.endswith("query.lora_A.weight"))
    frozen = {name: found[key][2:] for name, found in starts.items()}
    assert torch.equal(frozen["one"], frozen["same"])
    assert not torch.allclose(frozen["one"], frozen["pissa"], atol=0.01)


def test_a_killed_run_goes_on_from_its_own_start_to_the_same_bits(bert: Path, rows: Path, tmp_path: Path) -> None:
    whole = recipe(tmp_path / "whole.yaml", bert, rows, tmp_path / "whole", CORDA)
    train(build_recipe(whole, {}, []))
    cut = recipe(tmp_path / "cut.yaml", bert, rows, tmp_path / "cut", CORDA)
    process = start_slowly("train", cut)
    process.signal_at_step(13, signal.SIGKILL)
    process.end()
    assert not (tmp_path / "cut" / "metrics.json").exists()
    train(build_recipe(cut, {}, []), resume=True)
    assert_same_bits(tmp_path / "whole" / "adapter", tmp_path / "cut" / "adapter")
