"""What PEFT writes of embeddings and heads beside an adapter: read, merged, exported, and written for PEFT again."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import isotune
from isotune.checkpoint.read import read_stored
from isotune.diagnostics.sources import open_source
from isotune.errors import CheckpointError
from support import assert_same_output, move, output

CONFIG: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ADDED = 3
CASES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "both in full": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "embeddings in full": {"modules_to_save": ["embed_tokens"]},
    "rows": {"trainable_token_indices": [37, 39]},
    "rows of both": {"trainable_token_indices": {"embed_tokens": [38], "lm_head": [1, 39]}},
}


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def base(request: Any, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**CONFIG, tie_word_embeddings=request.param)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def opened(base: Path, added: int) -> Any:
    """The base; where tokens were added, with rows that are drawn anew each time."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    if added:
        model.resize_token_embeddings(CONFIG["vocab_size"] + added, mean_resizing=False)
    return model


def through_peft(model: Any, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, folder).eval()


def saved_by_peft(base: Path, added: int, folder: Path, options: dict[str, Any]) -> Any:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = move(peft.get_peft_model(opened(base, added), config)).eval()
        model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("added", [0, ADDED])
@pytest.mark.parametrize("case", CASES)
def test_folders_with_embeddings_are_read_merged_and_exported(
    case: str, added: int, base: Path, tmp_path: Path
) -> None:
    theirs, merged, exported = tmp_path / "theirs", tmp_path / "merged", tmp_path / "exported"
    expected = output(saved_by_peft(base, added, theirs, CASES[case]))
    model = isotune.load(opened(base, added), theirs).eval()
    assert_same_output(output(model), expected)
    isotune.merge([theirs], rule="sum", output=merged, base=base, progress=False)
    isotune.export_lora(theirs, exported, base=base)
    isotune.save(model, tmp_path / "ours")
    for folder in (merged, exported, tmp_path / "ours"):
        assert_same_output(output(isotune.load(opened(base, added), folder).eval()), expected)
        assert_same_output(output(through_peft(opened(base, added), folder)), expected)
    named = set(open_source(theirs, base).trained_modules)
    assert named <= set(open_source(merged, base).trained_modules)
    assert bool(named) == bool(added or CASES[case])


def test_embeddings_that_are_the_base_s_are_left_to_it(base: Path, tmp_path: Path) -> None:
    saved_by_peft(base, ADDED, tmp_path / "theirs", {})
    first = opened(base, ADDED)
    first.save_pretrained(tmp_path / "grown")
    isotune.save(isotune.load(first, tmp_path / "theirs"), tmp_path / "in full")
    grown = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "grown")
    again = saved_by_peft(tmp_path / "grown", 0, tmp_path / "again", {})
    model = isotune.load(grown, tmp_path / "again").eval()
    assert_same_output(output(model), output(again))
    assert not any("embed_tokens" in name for name, p in model.named_parameters() if p.requires_grad)
    assert read_stored(tmp_path / "in full").in_full == ["lm_head", "model.embed_tokens"]


def test_rows_without_their_base_ask_for_it(base: Path, tmp_path: Path) -> None:
    saved_by_peft(base, 0, tmp_path / "theirs", {"trainable_token_indices": [39]})
    with pytest.raises(CheckpointError, match=r"1 trained rows of 'model\.embed_tokens', .*name that with base="):
        read_stored(tmp_path / "theirs").completed(None)


@pytest.mark.parametrize("case", ["nothing", "both in full", "rows"])
def test_a_base_without_the_added_tokens_is_told_to_add_them(case: str, base: Path, tmp_path: Path) -> None:
    saved_by_peft(base, ADDED, tmp_path / "theirs", {**CASES[case]})
    with pytest.raises(CheckpointError, match=r"add them to the model as well: model\.resize_token_embeddings\(43\)"):
        isotune.load(opened(base, 0), tmp_path / "theirs")
