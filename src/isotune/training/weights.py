"""The weights in a checkpoint: an adapter or, of a model without adapters, all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from isotune.adapters.contract import Adapter
from isotune.checkpoint import load as adapters
from isotune.checkpoint.save import save
from isotune.errors import CheckpointError
from isotune.folders import ADAPTER
from isotune.model.names import adapted_layers
from isotune.model.switch import adapter_names

MODEL_FILE = "model.safetensors"
MEMORY_FILE = "training.safetensors"


def save_weights(model: nn.Module, checkpoint: Path, base_model: str) -> None:
    """Write what trains. Raises CheckpointError where it cannot be written."""
    if adapter_names(model):
        save(model, checkpoint / ADAPTER, base_model=base_model)
        if memory := _memory(model):
            _written(checkpoint / MEMORY_FILE, lambda path: save_file(memory, path))
        return
    _written(checkpoint / MODEL_FILE, lambda path: save_model(model, str(path)))


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Put it back, bit for bit. Raises CheckpointError where it cannot be read, or is another model's."""
    if adapter_names(model):
        adapters.load_weights(model, checkpoint / ADAPTER)
        if memory := _memory(model):
            _read(checkpoint / MEMORY_FILE, lambda path: _remember(memory, load_file(path)))
        return
    _read(checkpoint / MODEL_FILE, lambda path: load_model(model, path))


def _memory(model: nn.Module) -> dict[str, Tensor]:
    """What only the training of adapters needs, by name; such as how important each number was so far."""
    return {
        f"{path}.{own}": tensor
        for path, layer in adapted_layers(model)
        for own, tensor in layer.isotune.state_dict().items()
        if own.partition(".")[2] in cast(Adapter, layer.isotune[own.partition(".")[0]]).memory
    }


def _remember(memory: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    if memory.keys() != stored.keys():
        raise RuntimeError("it is another adapter's")
    for name, tensor in memory.items():
        tensor.copy_(stored[name])


def _written(path: Path, write: Callable[[Path], object]) -> None:
    try:
        write(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def _read(path: Path, read: Callable[[Path], object]) -> None:
    try:
        read(path)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be loaded: {error}") from None
