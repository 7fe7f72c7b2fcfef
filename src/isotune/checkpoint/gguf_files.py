"""GGUF files as base models: dequantised once, into a folder that transformers and everything here reads.

transformers' own reader does it, tokenizer and chat template included. The folder is kept in the cache of
`unpacking`, because reading takes a model ten times as long from GGUF.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from isotune.checkpoint.unpacking import unpacked_by
from isotune.errors import CheckpointError

SUFFIX = ".gguf"


def is_gguf(name: str | Path) -> bool:
    """Whether the name is that of a GGUF file at hand."""
    return str(name).endswith(SUFFIX) and Path(name).expanduser().is_file()


def unpacked(file: str | Path) -> Path:
    """The folder of a transformers model with the file's weights (fp32), its tokenizer and its chat template.

    Raises CheckpointError where the package gguf is missing, the file cannot be read, is of an architecture that
    transformers does not read from GGUF, or the cache cannot be written.
    """
    return unpacked_by(_unpack, Path(file).expanduser(), "gguf")


def _unpack(file: Path, folder: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise CheckpointError(f"{file} is a GGUF file, which takes a package to read: pip install 'isotune[llm]'")
    import torch
    import transformers

    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    except Exception as error:  # a damaged file surfaces as whatever its reader raises
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(f"{file} cannot be read as a causal language model: {reason}") from None
    # What is left is a plain model; transformers would refuse to save one that it has read from GGUF.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
