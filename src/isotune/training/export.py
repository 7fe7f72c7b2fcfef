"""From a run or an adapter folder to what others load: the folded model, or PEFT's own layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers

from isotune.checkpoint.files import read_adapter, replaced_folder
from isotune.checkpoint.load import load
from isotune.errors import CheckpointError, IsotuneError
from isotune.folders import TASK
from isotune.model.fold import fold
from isotune.training.model_folder import write_model
from isotune.training.models import load_tokenizer, locate
from isotune.training.progress import quiet_libraries
from isotune.training.session import Session, TaskSpec


def base_of(adapter: str | Path, base: str | None = None) -> str:
    """Where the base model of an adapter is: `base`, or what the adapter's config says.

    Raises IsotuneError where neither leads to a model.
    """
    config, _, _ = read_adapter(adapter)
    name = base or config.get("base_model_name_or_path")
    if not name:
        raise CheckpointError(f"{adapter} does not say which base model it was made for; name it with --base")
    return locate(name)


def export_merged(adapter: str | Path, output: str | Path, base: str | None = None, force: bool = False) -> Path:
    """Write the base model with the adapter folded into its weights, as a transformers model folder.

    Where `isotune train` made the adapter, `isotune evaluate` reads the folder, too: what it was trained for is
    written beside the weights (`task.json`).

    Args:
        adapter: The adapter's folder.
        output: The folder to write; it must be absent or empty.
        base: The base model, where the adapter's config does not find it.
        force: Accept a base whose configuration differs from the adapter's own.

    Raises:
        IsotuneError: The adapter or its base cannot be used, or the folder cannot be written.
    """
    quiet_libraries()
    adapter, where = Path(adapter), base_of(adapter, base)
    with replaced_folder(output, replaces=None) as folder:
        spec = TaskSpec.read(adapter) if (adapter / TASK).is_file() else None
        if spec:
            session = Session(replace(spec, model=where, quantization=None))
            model, tokenizer = session.model, session.tokenizer
        else:
            model, tokenizer = _load_by_architecture(where), load_tokenizer(where)
        fold(load(model, adapter, force=force), keep_base=False)
        write_model(folder, model, tokenizer, spec)
    return Path(output)


def _load_by_architecture(where: str) -> Any:
    """The base in the class that its own config names."""
    try:
        config = transformers.AutoConfig.from_pretrained(where)
        kind = getattr(transformers, (config.architectures or ["AutoModel"])[0])
        return kind.from_pretrained(where)
    except (OSError, ValueError, AttributeError) as error:
        raise IsotuneError(f"the base model {where} cannot be loaded: {error}") from None
