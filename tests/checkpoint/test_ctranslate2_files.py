"""Whisper in CTranslate2's files: the same bits, unpacked once; what else such a file may be is refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from torch import Tensor

from isotune.checkpoint.base import StoredBase, local_folder
from isotune.checkpoint.ctranslate2_files import unpacked
from isotune.errors import CheckpointError, IsotuneError
from isotune.training.models import load_tokenizer, locate


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ISOTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ctranslate2"


@pytest.fixture(scope="module")
def whisper() -> Any:
    """A random Whisper in half precision."""
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=64, num_mel_bins=12, encoder_layers=2, decoder_layers=3, d_model=16, encoder_attention_heads=2,
        decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=40, max_source_positions=20,
        max_target_positions=10, pad_token_id=62, bos_token_id=62, eos_token_id=62, decoder_start_token_id=63,
        init_std=0.3,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config).eval().half()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_()
    return model


def variables(model: Any) -> dict[str, Tensor]:
    """A Whisper's tensors as CTranslate2 names and packs them."""
    found: dict[str, Tensor] = {}

    def put(name: str, layer: Any, ending: str = "weight") -> None:
        norm = isinstance(layer, torch.nn.LayerNorm)
        found[f"{name}/{'gamma' if norm else ending}"] = layer.weight
        if getattr(layer, "bias", None) is not None:
            found[f"{name}/{'beta' if norm else 'bias'}"] = layer.bias

    def packed(name: str, layers: list[Any]) -> None:
        biases = [torch.zeros_like(one.weight[:, 0]) if one.bias is None else one.bias for one in layers]
        found[f"{name}/weight"] = torch.cat([one.weight for one in layers])
        found[f"{name}/bias"] = torch.cat(biases)

    for side, part in (("encoder", model.model.encoder), ("decoder", model.model.decoder)):
        for number, layer in enumerate(part.layers):
            at = f"{side}/layer_{number}"
            own = layer.self_attn
            packed(f"{at}/self_attention/linear_0", [own.q_proj, own.k_proj, own.v_proj])
            put(f"{at}/self_attention/linear_1", own.out_proj)
            put(f"{at}/self_attention/layer_norm", layer.self_attn_layer_norm)
            if side == "decoder":
                cross = layer.encoder_attn
                put(f"{at}/attention/linear_0", cross.q_proj)
                packed(f"{at}/attention/linear_1", [cross.k_proj, cross.v_proj])
                put(f"{at}/attention/linear_2", cross.out_proj)
                put(f"{at}/attention/layer_norm", layer.encoder_attn_layer_norm)
            put(f"{at}/ffn/linear_0", layer.fc1)
            put(f"{at}/ffn/linear_1", layer.fc2)
            put(f"{at}/ffn/layer_norm", layer.final_layer_norm)
        put(f"{side}/layer_norm", part.layer_norm)
        put(f"{side}/position_encodings", part.embed_positions, "encodings")
        found[f"{side}/num_heads"] = torch.tensor(part.layers[0].self_attn.num_heads, dtype=torch.int16)
    put("encoder/conv1", model.model.encoder.conv1)
    put("encoder/conv2", model.model.encoder.conv2)
    put("decoder/embeddings", model.model.decoder.embed_tokens)
    found["decoder/pre_norm"] = torch.tensor(1, dtype=torch.int8)
    return {name: tensor.detach() for name, tensor in found.items()}


def write(folder: Path, tensors: dict[str, Tensor], kind: str = "WhisperSpec", version: int = 6) -> Path:
    """The files of a model of CTranslate2."""
    folder.mkdir(exist_ok=True)
    kinds = {torch.float32: 0, torch.int8: 1, torch.int16: 2, torch.float16: 4}

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    out = struct.pack("<I", version) + text(kind) + struct.pack("<II", 3, len(tensors))
    for name, tensor in sorted(tensors.items()):
        held = np.ascontiguousarray(tensor.numpy()).tobytes()
        out += text(name) + struct.pack("<B", tensor.dim()) + b"".join(struct.pack("<I", n) for n in tensor.shape)
        out += struct.pack("<BI", kinds[tensor.dtype], len(held)) + held
    out += struct.pack("<I", 1) + text("decoder/projection/weight") + text("decoder/embeddings/weight")
    (folder / "model.bin").write_bytes(out)
    (folder / "config.json").write_text(json.dumps({"suppress_ids": [5, 6], "suppress_ids_begin": [7]}))
    words = {f"w{number}": number for number in range(62)} | {"<|endoftext|>": 62, "<|startoftranscript|>": 63}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<|endoftext|>")).save(str(folder / "tokenizer.json"))
    return folder / "model.bin"


def test_a_whisper_is_read_to_the_bit(whisper: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "ct2", variables(whisper))
    folder = unpacked(file)
    read = transformers.WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float16)
    state = whisper.state_dict()
    assert read.state_dict().keys() == state.keys()
    for name, tensor in read.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    for name in ("encoder_layers", "decoder_layers", "d_model", "encoder_attention_heads", "decoder_attention_heads",
                 "encoder_ffn_dim", "decoder_ffn_dim", "max_source_positions", "max_target_positions", "num_mel_bins",
                 "vocab_size", "eos_token_id", "pad_token_id", "decoder_start_token_id"):  # fmt: skip
        assert getattr(read.config, name) == getattr(whisper.config, name), name
    assert transformers.AutoFeatureExtractor.from_pretrained(folder).feature_size == 12
    assert load_tokenizer(str(folder)).pad_token == "<|endoftext|>"


def test_it_is_unpacked_once_and_found_by_its_name(whisper: Any, tmp_path: Path, cache: Path) -> None:
    file = write(tmp_path / "ct2", variables(whisper))
    first = unpacked(file)
    before = (first / "model.safetensors").stat().st_mtime_ns
    assert unpacked(file) == first == local_folder(file)
    assert locate(str(file)) == str(first)
    assert (first / "model.safetensors").stat().st_mtime_ns == before
    assert first.parent == cache
    stored = StoredBase(file).weight("encoder.layers.0.self_attn.k_proj")
    assert torch.equal(stored, whisper.model.encoder.layers[0].self_attn.k_proj.weight)


def test_what_is_no_whole_whisper_is_refused(whisper: Any, tmp_path: Path) -> None:
    found = variables(whisper)
    with pytest.raises(CheckpointError, match="is a TransformerSpec of CTranslate2; of its models only Whisper"):
        unpacked(write(tmp_path / "other", found, kind="TransformerSpec"))
    with pytest.raises(CheckpointError, match="version 9 of the format is none of 3 to 6"):
        unpacked(write(tmp_path / "new", found, version=9))
    scale = {"encoder/layer_0/ffn/linear_0/weight_scale": torch.ones(24)}
    with pytest.raises(CheckpointError, match=r"is quantised; take a Whisper of CTranslate2 in float16"):
        unpacked(write(tmp_path / "int8", {**found, **scale}))
    lacking = {name: tensor for name, tensor in found.items() if name != "encoder/conv2/bias"}
    with pytest.raises(CheckpointError, match=r"no whole Whisper: model.encoder.conv2.bias"):
        unpacked(write(tmp_path / "lacking", lacking))
    file = write(tmp_path / "cut", found)
    for length in (0, 3, 40, 2000):
        file.write_bytes(file.read_bytes()[:length])
        with pytest.raises(CheckpointError, match="cannot be read as a model of CTranslate2"):
            unpacked(file)


def test_a_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(IsotuneError, match=r"'whisper-tiny.en' comes with a package: .*isotune\[whisper\]'"):
        locate("whisper-tiny.en")
