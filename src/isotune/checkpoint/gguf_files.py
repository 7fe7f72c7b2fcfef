"""GGUF files as base models: dequantised once, into a folder that transformers and everything here reads.

transformers' own reader does it, tokenizer and chat template included. The folder is kept in a cache, by the SHA-256
of the file, because reading takes a model ten times as long from GGUF: `$ISOTUNE_CACHE`, or `~/.cache/isotune`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from isotune.checkpoint.files import replaced_folder
from isotune.errors import CheckpointError
from isotune.folders import MODEL_CONFIG
from isotune.locks import lock

SUFFIX = ".gguf"


def is_gguf(name: str | Path) -> bool:
    """Whether the name is that of a GGUF file at hand."""
    return str(name).endswith(SUFFIX) and Path(name).expanduser().is_file()


def unpacked(file: str | Path) -> Path:
    """The folder of a transformers model with the file's weights (fp32), its tokenizer and its chat template.

    Raises CheckpointError where the package gguf is missing, the file cannot be read, is of an architecture that
    transformers does not read from GGUF, or the cache cannot be written.
    """
    file = Path(file).expanduser()
    folder = _cache() / "gguf" / _digest(file)
    if not (folder / MODEL_CONFIG).is_file():
        if importlib.util.find_spec("gguf") is None:
            raise CheckpointError(f"{file} is a GGUF file, which takes a package to read: pip install 'isotune[llm]'")
        with _alone(folder.with_suffix(".lock")):
            if not (folder / MODEL_CONFIG).is_file():
                with replaced_folder(folder, replaces=None) as new:
                    _unpack(file, new)
    return folder


def _unpack(file: Path, folder: Path) -> None:
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


def _digest(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()[:32]
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None


def _cache() -> Path:
    return Path(os.environ.get("ISOTUNE_CACHE") or Path.home() / ".cache" / "isotune").expanduser()


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Wait until no other process is at it."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        stream = file.open("w")
    except OSError as error:
        raise CheckpointError(
            f"the cache of unpacked models cannot be written ({error}); name a folder with ISOTUNE_CACHE=..."
        ) from None
    with stream:
        while True:
            try:
                lock(stream)
                break
            except BlockingIOError:
                time.sleep(0.2)
        yield
