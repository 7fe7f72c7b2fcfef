"""The weights in a checkpoint: an adapter or, of a model without adapters, all of them."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from isotune.checkpoint import load as adapters
from isotune.checkpoint.save import save
from isotune.errors import CheckpointError
from isotune.folders import ADAPTER
from isotune.model.switch import adapter_names

MODEL_FILE = "model.safetensors"


def save_weights(model: nn.Module, checkpoint: Path, base_model: str) -> None:
    """Write what trains. Raises CheckpointError where it cannot be written."""
    if adapter_names(model):
        save(model, checkpoint / ADAPTER, base_model=base_model)
        return
    try:
        save_model(model, str(checkpoint / MODEL_FILE))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{checkpoint / MODEL_FILE}: {error}") from None


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Put it back, bit for bit. Raises CheckpointError where it cannot be read, or is another model's."""
    if adapter_names(model):
        adapters.load_weights(model, checkpoint / ADAPTER)
        return
    try:
        load_model(model, checkpoint / MODEL_FILE)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint / MODEL_FILE} cannot be loaded: {error}") from None
