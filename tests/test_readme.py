"""What the README tells people to run does run."""

from __future__ import annotations

import gzip
import importlib.resources
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

import isotune
from isotune.adapters.registry import method_names
from isotune.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(section: str, language: str) -> list[str]:
    """The code blocks of a section, by language."""
    body = re.search(rf"^## {section}$(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)
    assert body is not None
    return re.findall(rf"^```{language}\n(.*?)^```", body.group(1), re.MULTILINE | re.DOTALL)


def test_the_command_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = importlib.resources.files("isotune.training") / "scicite" / "validation.jsonl.gz"
    rows = [json.loads(line) for line in gzip.decompress(source.read_bytes()).decode().splitlines()]
    for name, part in (("train", rows[:48]), ("test", rows[48:64])):
        lines = [f'"{row["text"].replace(chr(34), chr(39))}",{row["label"]}' for row in part]
        (tmp_path / f"{name}.csv").write_text("\n".join(["text,label", *lines]))
    (recipe,) = blocks("From the command line", "yaml")
    (tmp_path / "recipe.yaml").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    (commands,) = blocks("From the command line", "")
    resume = re.search(r"`(isotune train [^`]*--resume)`", README)
    assert resume is not None
    for line in [*commands.splitlines(), resume.group(1)]:
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        with pytest.raises(SystemExit) as stop:
            app.main()
        assert not stop.value.code, line
    assert (tmp_path / "predictions.csv").is_file()
    assert (tmp_path / "my-lora" / "adapter_model.safetensors").is_file()
    assert json.loads((tmp_path / "my-recipe-run" / "metrics.json").read_text())["steps"] == 2


def test_the_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama = ROOT / "tests" / "data" / "stories260k"
    monkeypatch.chdir(tmp_path)
    ids = torch.arange(3, 19).reshape(2, 8)
    first, second = blocks("In Python", "python")
    names = {"torch": torch, "batches": [{"input_ids": ids, "labels": ids}] * 2}
    exec(first.replace("path/to/model", str(llama)), names)
    isotune.save(names["model"], "other-adapter")
    exec(second, names)
    assert (tmp_path / "my-lora" / "adapter_config.json").is_file()


def test_the_table_of_methods_names_methods_and_leads_to_all_of_them() -> None:
    (table,) = re.findall(r"^## Methods$(.*?)^HRA options", README, re.MULTILINE | re.DOTALL)
    named = re.findall(r"^\| `(\w+)`", table, re.MULTILINE)
    assert {"hra", "lora"} <= set(named) <= set(method_names())
    assert "](docs/methods.md)" in table
