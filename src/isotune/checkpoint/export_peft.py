"""Export an adapter in PEFT's own layout, with nothing of isotune's in it."""

from __future__ import annotations

from pathlib import Path

from isotune.adapters.peft.dialect import NotInPEFTError, dialect_of
from isotune.adapters.registry import method_class
from isotune.checkpoint.card import adapter_card
from isotune.checkpoint.files import CARD, replaced_folder, write_adapter
from isotune.checkpoint.read import read_stored
from isotune.checkpoint.stored import FULL, MODEL, PREFIX, StoredAdapter, own_type
from isotune.errors import CheckpointError


def export_peft(adapter: str | Path, path: str | Path) -> Path:
    """Write the adapter in the folder `adapter` as PEFT itself would: PEFT's tensors and config, nothing else.

    Raises:
        CheckpointError: PEFT has no such method or cannot express these options (the message says which), or a
            folder cannot be read or written.
    """
    stored = read_stored(adapter).completed(None)
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
    with replaced_folder(path) as folder:
        write_adapter(folder, config, tensors)
        (folder / CARD).write_text(adapter_card(config, stored.settings, tensors, None, stored.base.labels))
    return Path(path)


def _why_not(stored: StoredAdapter) -> str:
    if stored.method == FULL:
        return "it has no adapted layer"
    for p, entry in (stored.header or {"sites": {}})["sites"].items():
        if "refused" in entry:
            return f"{p} {entry['refused']}"
    try:
        dialect_of(method_class(stored.method)).config(stored.settings)
    except NotInPEFTError as error:
        return str(error)
    return "its config says so"
