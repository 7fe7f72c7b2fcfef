"""Tiny models and data, made on the fly."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ANIMALS = ["cat", "dog", "cow", "hen", "fox", "owl"]
PLANTS = ["oak", "fir", "elm", "ivy", "rye", "fig"]
FILLERS = ["the", "a", "sees", "near", "and", "old", "small", "green"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def save_tokenizer(folder: Path, classify: bool) -> int:
    """A word-level tokenizer; encoders get [CLS] and [SEP] around a text. Returns the vocabulary's size."""
    words = [*SPECIAL, *ANIMALS, *PLANTS, *FILLERS]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    if classify:
        core.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[SEP]", "bos_token": "[CLS]"}
    PreTrainedTokenizerFast(tokenizer_object=core, **names).save_pretrained(folder)
    return len(words)


def make_bert(folder: Path, width: int = 32, inner: int = 48) -> Path:
    """A random two-layer BERT, with dropout, in a model folder."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=save_tokenizer(folder, classify=True),
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=inner,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    return folder


def make_llama(folder: Path) -> Path:
    """A random two-layer Llama of width 32 in a model folder."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=save_tokenizer(folder, classify=False),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def sentences(count: int, seed: int) -> list[dict[str, str]]:
    """Texts about animals or plants, with their labels; lengths vary."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        label, words = ("animal", ANIMALS) if number % 2 else ("plant", PLANTS)
        text = " ".join(draw.choice([*FILLERS, *words]) for _ in range(draw.randint(2, 9)))
        rows.append({"text": f"{text} {draw.choice(words)}", "label": label})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny encoder."""
    return make_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny causal language model."""
    return make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.jsonl (48 rows) and test.jsonl (15 rows)."""
    folder = tmp_path_factory.mktemp("rows")
    write_jsonl(folder / "train.jsonl", sentences(48, seed=1))
    write_jsonl(folder / "test.jsonl", sentences(15, seed=2))
    return folder


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 40 prompts with completions."""
    pairs = sentences(40, seed=3)
    path = tmp_path_factory.mktemp("prompts") / "train.jsonl"
    return write_jsonl(path, [{"question": row["text"], "answer": f"the {row['text']}"} for row in pairs])


def write_recipe(path: Path, model: Path, rows: Path, output: Path, **training: Any) -> Path:
    """A classification recipe of 27 steps: 3 epochs of 9 batches, a checkpoint every 5 steps."""
    recipe = {
        "model": str(model),
        "data": {"train": str(rows / "train.jsonl"), "test": str(rows / "test.jsonl"), "max_length": 16},
        "method": {"name": "hra", "rank": 2},
        "targets": "query-value",
        "training": {
            "num_train_epochs": 3,
            "per_device_train_batch_size": 5,
            "save_steps": 5,
            "logging_steps": 3,
            "learning_rate": 0.01,
            **training,
        },
        "output": str(output),
    }
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


def environment() -> dict[str, str]:
    """One thread, no hub, no devices: subprocesses compute the same as this process and start no downloads."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}


def tensors(adapter: Path) -> dict[str, torch.Tensor]:
    """The saved tensors of an adapter folder."""
    return load_file(adapter / "adapter_model.safetensors")


def assert_same_bits(one: Path, other: Path) -> None:
    """The two adapters hold the same tensors, bit for bit."""
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    assert a
    for key in a:
        assert torch.equal(a[key], b[key]), key
