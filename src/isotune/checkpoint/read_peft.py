"""What PEFT's own adapter folders say."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from isotune.adapters.peft.dialect import Dialect, dialect_of
from isotune.adapters.registry import method_class, method_names
from isotune.checkpoint.stored import PREFIX, State, StoredAdapter, check_shared, split_shared, with_rows
from isotune.checkpoint.whole_peft import read_whole
from isotune.errors import CheckpointError, OptionError

_ROWS = ".token_adapter.trainable_tokens_delta"


def read_peft(
    path: Path, config: dict[str, Any], tensors: dict[str, Tensor], known: Mapping[str, nn.Module] | None
) -> StoredAdapter:
    """What PEFT's config and tensors say, of a model with these modules. Raises as `read_stored` does."""
    dialect = _dialect_of(config, path)
    if dialect.whole:
        return read_whole(path, config, tensors, dialect, known)
    prefix = dialect.prefix
    prefix_there = dialect.aliases.get(config["peft_type"], prefix)
    if config.get("bias", "none") != "none":
        raise OptionError(f"its config has bias={config['bias']!r}; trained biases are not supported")
    state: State = defaultdict(dict)
    trained: State = defaultdict(dict)
    base_weights: dict[str, Tensor] = {}
    rows: dict[str, tuple[list[int], Tensor]] = {}
    in_full = config.get("modules_to_save") or []
    shared, tensors = split_shared(tensors)
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        layer, mark, tensor_name = name.rpartition(f".{prefix_there}")
        module = next((m for full in in_full if (m := re.match(rf"(?:.*?\.)?{re.escape(full)}(?=\.)", name))), None)
        if mark and f"{prefix}{tensor_name}" in shared:
            # Some versions of PEFT store what the layers share with each layer, too.
            if not tensor.equal(shared[f"{prefix}{tensor_name}"]):
                raise CheckpointError(f"{path} holds {key!r}, which differs from what all layers share")
        elif mark:
            state[layer][f"{prefix}{tensor_name}"] = tensor
        elif name.endswith(_ROWS):
            p = name.removesuffix(_ROWS)
            rows[p] = _indices(config, p), tensor
        elif name.endswith(".base_layer.weight"):
            base_weights[name.removesuffix(".base_layer.weight").removesuffix(".token_adapter")] = tensor
        elif module is not None:
            # Of an embedding PEFT stores its wrapper as well: the values of before, and the trained ones twice.
            tensor_name = name.removeprefix(f"{module.group()}.").removeprefix("modules_to_save.")
            if not tensor_name.startswith("original_module."):
                trained[module.group()][tensor_name] = tensor
        elif tensor.dim() == 2 and name.endswith(".weight") and not _of_an_adapter(name):
            base_weights[name.removesuffix(".weight")] = tensor  # an embedding, where tokens were added
        else:
            raise CheckpointError(
                f"{path} holds {key!r}, which is no tensor of {config['peft_type']!r} and of no module to save"
            )
    names = _own_names(state)
    others = {key: value for key, value in config.items() if key != "trainable_token_indices"}
    settings = {own: dialect.read(others, p) for p, own in names.items()}
    state = {own: state[p] for p, own in names.items()}
    if not settings:
        raise CheckpointError(f"{path} is incomplete: it has no tensors of its type, {config['peft_type']!r}")
    check_shared(path, next(iter(settings.values())), shared)
    # Where the embeddings were resized, the weight around the rows is in the file as well.
    for p in rows.keys() & base_weights.keys():
        trained[p]["weight"] = with_rows(base_weights.pop(p), *rows.pop(p))
    return StoredAdapter(path, config, None, settings, dict(state), dict(trained), shared, base_weights, rows)


def _of_an_adapter(name: str) -> bool:
    """Whether the tensor of this name would be one of some method that PEFT has."""
    prefixes = tuple(dialect_of(method_class(name)).prefix for name in method_names())
    return any(part.startswith(prefixes) for part in name.split("."))


def _indices(config: dict[str, Any], p: str) -> list[int]:
    """Which rows of the embedding at p PEFT trained: one list for all, or one for each name."""
    indices = config["trainable_token_indices"]
    if isinstance(indices, dict):
        indices = next(found for name, found in indices.items() if p == name or p.endswith(f".{name}"))
    return list(indices)


def _own_names(paths: Iterable[str]) -> dict[str, str]:
    """The paths in PEFT's file with those that isotune has for the same: PEFT adapts nn.MultiheadAttention whole."""
    inner = ".base_layer.out_proj"
    whole = {p.removesuffix(inner) for p in paths if p.endswith(inner)}
    return {p: f"{p}.in_proj_weight" if p in whole else p.replace(inner, ".out_proj") for p in paths}


def _dialect_of(config: dict[str, Any], path: Path) -> Dialect:
    """That of the method which claims the config, or of the first of its type."""
    peft_type = config["peft_type"]
    known = [dialect_of(method_class(name)) for name in method_names()]
    of_type = [one for one in known if peft_type == one.peft_type or peft_type in one.aliases]
    if of_type:
        return next((one for one in of_type if one.claims(config)), of_type[0])
    types = dict.fromkeys(name for one in known for name in (one.peft_type, *one.aliases) if name)
    raise CheckpointError(
        f"{path} is a PEFT adapter of type {peft_type!r}; the types that can be read are: {', '.join(types)}"
    )
