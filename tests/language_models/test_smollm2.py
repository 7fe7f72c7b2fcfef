"""SmolLM2-135M-Instruct from its package: read as llama.cpp reads it, trained, evaluated and talked to."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from examples import ROOT, blocks, run_isotune
from isotune.checkpoint.base import SMOLLM2, local_folder
from isotune.training.generation import Talk
from isotune.training.models import load_causal, load_tokenizer
from isotune.training.opening import open_any

pytestmark = pytest.mark.models
REFERENCE = Path(__file__).with_name("smollm2_llama_cpp.json")
"""What llama.cpp computes on the same file; `write_reference.py` writes it."""


@pytest.fixture(scope="module", autouse=True)
def at_hand() -> None:
    assert local_folder(SMOLLM2) is not None, "make test-models installs the package that carries SmolLM2"


def test_it_computes_what_llama_cpp_does() -> None:
    model, tokenizer = load_causal(SMOLLM2).eval(), load_tokenizer(SMOLLM2)
    for text, told in json.loads(REFERENCE.read_text()).items():
        ids = tokenizer(text)["input_ids"]
        assert ids == told["ids"]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        # llama.cpp rounds the inputs of each product to eight bits.
        torch.testing.assert_close(logits[told["top"]], torch.tensor(told["logits"]), rtol=0, atol=0.6)
        assert int(logits.argmax()) == told["top"][0]
        found = model.generate(
            torch.tensor([ids]), max_new_tokens=16, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        same = [a == b for a, b in zip(found[0, len(ids) :].tolist(), told["greedy"], strict=True)]
        assert all(same[:4])


def test_it_chats_in_its_own_template() -> None:
    talk = Talk(open_any(SMOLLM2, "causal-lm"))
    assert "Paris" in talk.ask("What is the capital of France?", 24)


def test_the_readmes_causal_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (shown,) = [b for b in blocks(ROOT / "README.md", "From the command line") if b.language == "bash"]
    asked = [{"role": "user", "content": "How many are three and four?"}, {"role": "assistant", "content": "7"}]
    rows: list[Any] = [{"messages": asked}] * 12
    for name in ("chats", "questions"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    commands = re.sub(r"\\\n", " ", shown.text).splitlines()
    for line in commands:
        words = shlex.split(line)[1:]
        if words[0] == "train":
            words += ["--set", "training.max_steps=3", "--set", "training.per_device_train_batch_size=2"]
        if words[0] != "chat":  # which waits for what is typed
            assert run_isotune(*words) == 0
    talk = Talk(open_any(tmp_path / "my-chat", "causal-lm"))
    assert talk.ask("How many are three and four?", 4)
