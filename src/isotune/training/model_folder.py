"""A whole trained model as a folder that transformers loads by itself, with what isotune needs to use it again.

Beside the weights, the configuration and the tokenizer lies `task.json`; version 0.1.0 wrote the backbone of a
classifier alone, and its head to `head.safetensors`. Full fine-tuning leaves such a folder, and
`isotune export --to merged` writes one.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from isotune.checkpoint.load import load
from isotune.checkpoint.read import holds_adapter
from isotune.errors import CheckpointError, IsotuneError
from isotune.folders import MODEL_CONFIG, TASK
from isotune.training.session import Session, TaskSpec

HEAD_FILE = "head.safetensors"


def is_model_folder(folder: Path) -> bool:
    """Whether a whole model is there, and not an adapter."""
    return (folder / MODEL_CONFIG).is_file() and not holds_adapter(folder)


def write_model(folder: Path, model: Any, tokenizer: Any, spec: TaskSpec | None) -> None:
    """Write a model without adapters into an empty folder.

    Args:
        folder: An existing folder, of `replaced_folder`.
        model: Any transformers model.
        tokenizer: Its tokenizer.
        spec: What it was trained for; None where that is not known.
    """
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if spec is not None:
        (folder / TASK).write_text(replace(spec, backbone=None).to_json(), encoding="utf-8")


def open_trained(
    folder: Path, model: str | None = None, force: bool = False, spec: TaskSpec | None = None
) -> Session:
    """The trained model in a folder: an adapter's, on its base, or a whole model.

    Args:
        folder: An adapter's folder, or one that `write_model` wrote.
        model: The pretrained model of an adapter, where it is not what the adapter was trained on by name.
        force: Use an adapter on a base model that does not look like its own.
        spec: What it is for, where the folder itself does not say.

    Raises:
        IsotuneError: The folder was not written by isotune, or its files, or the base, cannot be used.
    """
    spec = spec or TaskSpec.read(folder)
    if not is_model_folder(folder):
        session = Session(replace(spec, model=model) if model else spec)
        load(session.model, folder, force=force)
        return session
    if model:
        raise IsotuneError(f"{folder} holds a whole model and needs no pretrained one; leave out --model {model}")
    session = Session(replace(spec, model=str(folder)))
    if session.head and spec.backbone is not None:
        _load_head(session.model, folder / HEAD_FILE)
    return session


def _load_head(model: Any, file: Path) -> None:
    if not file.is_file():
        raise CheckpointError(f"{file.parent} holds no {HEAD_FILE}; the folder is incomplete")
    try:
        model.head.load_state_dict(load_file(file))
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{file} cannot be used as the classifier's head: {error}") from None
