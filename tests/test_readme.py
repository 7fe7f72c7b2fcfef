"""What the README tells people to run does run."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import isotune
from examples import ROOT, Block, blocks, run_commands, run_isotune, run_python
from isotune.adapters.registry import method_names
from support import STORIES, write_citations

PAGE = ROOT / "README.md"
README = PAGE.read_text()


def shown(section: str, language: str) -> list[Block]:
    """The code blocks of a section, by language."""
    return [block for block in blocks(PAGE, section) if block.language == language]


def test_the_command_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_citations(tmp_path)
    (recipe,) = shown("From the command line", "yaml")
    (tmp_path / "recipe.yaml").write_text(recipe.text)
    monkeypatch.chdir(tmp_path)
    (commands,) = shown("From the command line", "")
    run_commands(commands)
    resume = re.search(r"`isotune (train [^`]*--resume)`", README)
    assert resume is not None
    assert run_isotune(*shlex.split(resume.group(1))) == 0
    assert (tmp_path / "predictions.csv").is_file()
    assert (tmp_path / "my-lora" / "adapter_model.safetensors").is_file()
    assert json.loads((tmp_path / "my-recipe-run" / "metrics.json").read_text())["steps"] == 2


def stories(name: str) -> Any:
    """A small language model that has learned something."""
    return transformers.AutoModelForCausalLM.from_pretrained(name)


def shaped_like_smollm2(name: str) -> Any:
    """A drawn model with the widths and depth of SmolLM2-135M, for this tokenizer."""
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=transformers.AutoConfig.from_pretrained(name).vocab_size, hidden_size=576,
            intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
            tie_word_embeddings=True,
        )
    )  # fmt: skip


@pytest.mark.parametrize("model", [stories, shaped_like_smollm2])
def test_the_python_runs_as_pasted_and_improves_the_loss(
    model: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = shown("In Python", "python")
    Path("HuggingFaceTB").mkdir()
    Path("HuggingFaceTB/SmolLM2-135M").symlink_to(STORIES)
    made = model("HuggingFaceTB/SmolLM2-135M")
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name: made)
    losses: list[float] = []
    told = first.text.replace("    loss.backward()\n", "    loss.backward()\n    seen.append(loss.item())\n")
    names: dict[str, Any] = {"seen": losses}
    run_python(replace(first, text=told), names)
    assert losses[-1] < losses[0]
    isotune.save(names["model"], "other-adapter")
    run_python(second, names)
    assert (tmp_path / "my-lora" / "adapter_config.json").is_file()


def test_the_table_of_methods_names_methods_and_leads_to_all_of_them() -> None:
    (table,) = re.findall(r"^## Methods$(.*?)^HRA options", README, re.MULTILINE | re.DOTALL)
    named = re.findall(r"^\| `(\w+)`", table, re.MULTILINE)
    assert {"hra", "lora"} <= set(named) <= set(method_names())
    assert "](docs/methods.md)" in table
