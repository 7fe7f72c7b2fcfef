"""What PEFT's folders say of methods of which it keeps all layers in one tensor: of which, only a model tells."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from isotune.adapters.peft.dialect import Dialect
from isotune.checkpoint.stored import MODEL, State, StoredAdapter
from isotune.errors import CheckpointError
from isotune.model.targets import find_targets
from isotune.sites.block import Block


def read_whole(
    path: Path,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    dialect: Dialect,
    modules: Mapping[str, nn.Module] | None,
) -> StoredAdapter:
    """What the folder says of the model whose modules these are. Raises CheckpointError without, or for another."""
    if modules is None or "" not in modules:
        raise CheckpointError(
            f"{path} is PEFT's {config['peft_type']}, which does not say for which layers; load it on its model, "
            "with isotune.load, and save it again, and it will"
        )
    if config.get("prefix_projection") and any("transform" in key for key in tensors):
        raise CheckpointError(f"{path} is unfinished: it holds the network that makes the prefix, and not the prefix")
    method = dialect.method
    paths = in_order(find_targets(modules[""], method.usual_targets, kinds=method.kinds))
    for p in paths:
        if why := dialect.refused(Block(modules[p])):
            raise CheckpointError(f"{path} does not fit this model: {p} {why}")
    trained: State = {}
    for key in tensors.keys() - dialect.whole:
        p, _, name = key.removeprefix(MODEL).rpartition(".")
        trained.setdefault(p, {})[name] = tensors[key]
    state = dict(zip(paths, dialect.parted(tensors, len(paths)), strict=True))
    return StoredAdapter(path, config, None, {p: dialect.read(config, p) for p in paths}, state, trained, {})


def in_order(paths: Iterable[str]) -> list[str]:
    """Paths of layers, the tenth behind the ninth."""
    return sorted(
        paths, key=lambda path: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]
    )
