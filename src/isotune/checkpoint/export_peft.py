"""Export an adapter in PEFT's own layout, with nothing of isotune's in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from isotune.adapters.peft.dialect import Dialect, NotInPEFTError, dialect_of
from isotune.adapters.registry import method_class
from isotune.checkpoint.card import adapter_card
from isotune.checkpoint.files import CARD, replaced_folder, write_adapter
from isotune.checkpoint.read import read_stored
from isotune.checkpoint.stored import FULL, MODEL, PREFIX, StoredAdapter, own_type
from isotune.checkpoint.whole_peft import in_order
from isotune.errors import CheckpointError


def export_peft(adapter: str | Path, path: str | Path) -> Path:
    """Write the adapter in the folder `adapter` as PEFT itself would: PEFT's tensors and config, nothing else.

    Raises:
        CheckpointError: PEFT has no such method or cannot express these options (the message says which), or a
            folder cannot be read or written.
    """
    stored = read_stored(adapter).completed(None)
    dialect = dialect_of(method_class(stored.method)) if stored.settings else None
    if dialect is not None and dialect.whole and not _refused(stored):
        return _export_whole(stored, dialect, path)
    if stored.config["peft_type"].startswith(own_type("")):
        raise CheckpointError(
            f"{adapter} has no form that PEFT loads ({_why_not(stored)}); try isotune export --to lora"
        )
    own = dialect_of(method_class(stored.method)).own_tensors
    states = {**stored.state, **stored.trained}
    tensors = {
        f"{PREFIX}{p}.{key}": tensor for p, state in states.items() for key, tensor in state.items() if key not in own
    }
    tensors |= {f"{MODEL}{key}": tensor for key, tensor in stored.shared.items()}
    config = {**stored.config, "modules_to_save": sorted(stored.trained) or None}
    if config.get("trainable_token_indices"):
        config["trainable_token_indices"] = None  # the rows are in the modules to save
    return _written(stored, config, tensors, path)


def _export_whole(stored: StoredAdapter, dialect: Dialect, path: str | Path) -> Path:
    """The same of a method of which PEFT keeps all layers in one tensor, and has the model's own names otherwise."""
    try:
        fields = dialect.config(stored.settings)
    except NotInPEFTError as error:
        raise CheckpointError(f"{stored.path} has no form that PEFT loads ({error})") from None
    tensors = dialect.joined([stored.state[p] for p in in_order(stored.settings)])
    tensors |= {f"{MODEL}{p}.{key}": tensor for p, state in stored.trained.items() for key, tensor in state.items()}
    common = {key: stored.config.get(key) for key in ("base_model_name_or_path", "inference_mode", "task_type")}
    config = {"peft_type": dialect.peft_type, **common, **fields, "modules_to_save": sorted(stored.trained) or None}
    return _written(stored, config, tensors, path)


def _written(stored: StoredAdapter, config: dict[str, Any], tensors: dict[str, Tensor], path: str | Path) -> Path:
    with replaced_folder(path) as folder:
        write_adapter(folder, config, tensors)
        (folder / CARD).write_text(adapter_card(config, stored.settings, tensors, None, stored.base.labels))
    return Path(path)


def _refused(stored: StoredAdapter) -> str | None:
    """Why PEFT refuses one of its layers, or computes something else there; None where it does not."""
    sites = (stored.header or {"sites": {}})["sites"]
    reasons = {p: entry.get("refused") or entry.get("not_in_peft") for p, entry in sites.items()}
    return next((f"{p} {why}" for p, why in reasons.items() if why), None)


def _why_not(stored: StoredAdapter) -> str:
    if stored.method == FULL:
        return "it has no adapted layer"
    if refused := _refused(stored):
        return refused
    try:
        dialect_of(method_class(stored.method)).config(stored.settings)
    except NotInPEFTError as error:
        return str(error)
    return "its config says so"
