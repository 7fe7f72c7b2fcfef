"""Whisper models in CTranslate2's format: rewritten once, into a folder that transformers and everything here reads.

A file is a table of named tensors: a version, a name of the architecture and its revision, the number of variables,
for each its name, shape, type and bytes, and then the names that stand for others. Names say what a tensor is
(`encoder/layer_0/self_attention/linear_0/weight`); query, key and value are one matrix, key and value of the
cross-attention another, and the key has no bias in Whisper. Tensors stay in the type that they are stored in.
"""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from isotune.checkpoint.unpacked_once import unpacked_once
from isotune.errors import CheckpointError

FILE = "model.bin"
_TYPES = {0: torch.float32, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.float16, 5: torch.bfloat16}
_READ = range(3, 7)
"""Versions of the format with this layout."""
_LAYER = {
    "self_attention/linear_1": "self_attn.out_proj",
    "self_attention/layer_norm": "self_attn_layer_norm",
    "attention/linear_0": "encoder_attn.q_proj",
    "attention/linear_2": "encoder_attn.out_proj",
    "attention/layer_norm": "encoder_attn_layer_norm",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
    "ffn/layer_norm": "final_layer_norm",
}
_PACKED = {
    "self_attention/linear_0": [f"self_attn.{name}_proj" for name in ("q", "k", "v")],
    "attention/linear_1": [f"encoder_attn.{name}_proj" for name in ("k", "v")],
}
_AROUND = {"position_encodings": "embed_positions", "embeddings": "embed_tokens"}
_ENDING = {"gamma": "weight", "beta": "bias", "encodings": "weight"}


def is_ctranslate2(name: str | Path) -> bool:
    """Whether the name is that of a CTranslate2 file at hand."""
    return Path(name).name == FILE and Path(name).expanduser().is_file()


def unpacked(file: str | Path) -> Path:
    """The folder of a transformers Whisper with the file's weights, its tokenizer and its feature extractor.

    Raises CheckpointError where the file cannot be read, is damaged, is no Whisper or is quantised, or where the
    cache cannot be written.
    """
    return unpacked_once(Path(file).expanduser(), "ctranslate2", _unpack)


def _unpack(file: Path, folder: Path) -> None:
    import transformers

    try:
        with file.open("rb") as stream:
            kind, tensors = read_variables(stream)
    except (OSError, struct.error, UnicodeDecodeError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{file} cannot be read as a model of CTranslate2: {error!r}") from None
    if kind != "WhisperSpec":
        raise CheckpointError(f"{file} is a {kind} of CTranslate2; of its models only Whisper is read")
    if any(name.endswith("weight_scale") for name in tensors):
        raise CheckpointError(f"{file} is quantised; take a Whisper of CTranslate2 in float16 or float32")
    tokenizer = _tokenizer(file.parent / "tokenizer.json")
    said = json.loads((file.parent / "config.json").read_text(encoding="utf-8"))
    config = whisper_config(tensors, said, tokenizer.eos_token_id)
    with torch.device("meta"):
        model = transformers.WhisperForConditionalGeneration(config)
    missing, unexpected = model.load_state_dict(whisper_state(tensors), strict=False, assign=True)
    if unexpected or set(missing) - {"proj_out.weight"}:
        raise CheckpointError(f"{file} is no whole Whisper: {', '.join([*missing, *unexpected][:4])}")
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    transformers.WhisperFeatureExtractor(feature_size=config.num_mel_bins).save_pretrained(folder)


def _tokenizer(file: Path) -> Any:
    import transformers

    names = ("bos_token", "eos_token", "unk_token", "pad_token")
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(file), **dict.fromkeys(names, "<|endoftext|>"))


def read_variables(stream: IO[bytes]) -> tuple[str, dict[str, Tensor]]:
    """The architecture's name and the tensors, by name; scalars have no dimensions.

    Raises ValueError for another version or a file that ends too early, KeyError for an unknown type.
    """

    def number(form: str) -> int:
        return int(struct.unpack(f"<{form}", stream.read(struct.calcsize(form)))[0])

    def text() -> str:
        return stream.read(number("H")).rstrip(b"\0").decode()

    if (version := number("I")) not in _READ:
        raise ValueError(f"version {version} of the format is none of {_READ[0]} to {_READ[-1]}")
    kind, _ = text(), number("I")
    found = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        dtype, size = _TYPES[number("B")], number("I")
        held = bytearray(stream.read(size))
        if len(held) < size:
            raise ValueError(f"the file ends within {name}")
        found[name] = torch.frombuffer(held, dtype=dtype).reshape(shape)
    for _ in range(number("I")):
        alias, name = text(), text()
        found[alias] = found[name]
    return kind, found


def whisper_config(tensors: dict[str, Tensor], said: dict[str, Any], end: int) -> Any:
    """What the tensors' shapes, CTranslate2's own config.json and the number of the end token come to."""
    import transformers

    width, mels, _ = tensors["encoder/conv1/weight"].shape
    return transformers.WhisperConfig(
        vocab_size=len(tensors["decoder/embeddings/weight"]),
        num_mel_bins=mels,
        d_model=width,
        encoder_layers=_layers(tensors, "encoder"),
        decoder_layers=_layers(tensors, "decoder"),
        encoder_attention_heads=int(tensors["encoder/num_heads"]),
        decoder_attention_heads=int(tensors["decoder/num_heads"]),
        encoder_ffn_dim=len(tensors["encoder/layer_0/ffn/linear_0/weight"]),
        decoder_ffn_dim=len(tensors["decoder/layer_0/ffn/linear_0/weight"]),
        max_source_positions=len(tensors["encoder/position_encodings/encodings"]),
        max_target_positions=len(tensors["decoder/position_encodings/encodings"]),
        decoder_start_token_id=end + 1,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        suppress_tokens=said.get("suppress_ids"),
        begin_suppress_tokens=said.get("suppress_ids_begin"),
        dtype=tensors["encoder/conv1/weight"].dtype,
    )


def _layers(tensors: dict[str, Tensor], side: str) -> int:
    found = [re.match(rf"{side}/layer_(\d+)/", name) for name in tensors]
    return 1 + max(int(match[1]) for match in found if match)


def whisper_state(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by transformers' names; what is no weight is left out."""
    found = {}
    for name, tensor in tensors.items():
        side, *inside, ending = name.split("/")
        if not inside or inside == ["projection"]:  # a number, or the embeddings again
            continue
        ending = _ENDING.get(ending, ending)
        part = "/".join(inside[1:])
        before, names = f"model.{side}", [_AROUND.get(inside[0], inside[0])]
        if part:
            before += f".layers.{inside[0].removeprefix('layer_')}"
            names = _PACKED.get(part) or [_LAYER[part]]
        for one, piece in zip(names, tensor.chunk(len(names)), strict=True):
            if not (one.endswith("k_proj") and ending == "bias"):
                found[f"{before}.{one}.{ending}"] = piece.clone()
    return found
