"""Whether full models can be merged, found out before any tensor is read: every problem in one message."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from isotune.checkpoint.stored_models import StoredModel, read_model
from isotune.checkpoint.tensor_kinds import Kinds, is_vocabulary
from isotune.checkpoint.vocabularies import difference, rows_of, token_ids
from isotune.errors import CheckpointError, OptionError
from isotune.merging.models.ties import full_config, share_all
from isotune.merging.names import model_names

Vocabulary = Literal["error", "intersect"]

_BOOKKEEPING = re.compile(
    r"^(_.*|transformers_version|dtype|torch_dtype|architectures|use_cache|vocab_size|.*dropout.*|.*_pdrop"
    r"|initializer_.*|.*_token_id|output_.*|return_.*|id2label|label2id|problem_type|finetuning_task"
    r"|task_specific_params|max_position_embeddings|pretraining_tp|tie_word_embeddings|gradient_checkpointing|auto_map|tokenizer_class|unsloth.*)$"
)
_COMPUTED = re.compile(r"(rotary_emb\.inv_freq|\.attn\.masked_bias|\.h\.\d+\.attn\.bias)$")
"""Buffers that old versions stored and new ones compute."""


@dataclass(frozen=True)
class ModelInputs:
    """Models that can be merged."""

    origin: StoredModel
    """What changes are relative to: the base, or the first model where there is none."""
    models: tuple[StoredModel, ...]
    kinds: Kinds
    merged: frozenset[str]
    """The tensors that are merged."""
    copied: frozenset[str]
    """The tensors that are copied from the origin: integers, booleans, and buffers that models compute."""
    rows: tuple[Tensor | None, ...]
    """For each model, its row for each row of the origin's embeddings (-1: none); None where they are the same."""
    untied: frozenset[str]
    """Heads that some of the models tie to their embeddings and some do not: the merged model has its own."""
    notes: tuple[str, ...]
    """What a person should know, though it is no problem."""

    @property
    def names(self) -> list[str]:
        """All tensors that the merged model has, in the order of the origin's files."""
        return [name for name in self.origin.headers if name in self.merged or name in self.copied]

    def is_vocabulary(self, name: str) -> bool:
        """Whether the tensor has a row for each token."""
        return _is_vocabulary(self.origin, name)


def check_checkpoints(
    folders: Sequence[str | Path],
    base: str | Path | None = None,
    names: Sequence[str] | None = None,
    vocabulary: Vocabulary = "error",
) -> ModelInputs:
    """Check that models have the same architecture, tensors, shapes, kinds of dtypes, and tokens.

    Only configs, tokenizers and the headers of safetensors files are read.

    Args:
        folders: Model folders (or hub ids), with config.json and model.safetensors, in one file or in shards.
        base: The pretrained model that all were fine-tuned from; without it the first model takes its place.
        names: What to call the models; by default what tells their paths apart.
        vocabulary: What to do where tokens differ: refuse, or merge rows of embeddings and output heads by token.

    Raises:
        CheckpointError: They cannot be merged; the message lists every reason.
        OptionError: No folders, a wrong number of names, names that are not all different, or another vocabulary.
    """
    if vocabulary not in ("error", "intersect"):
        raise OptionError(f"vocabulary={vocabulary!r} is not usable; it is 'error' or 'intersect'")
    labels = model_names(folders, names)
    problems: list[str] = []
    read: list[StoredModel] = []
    for place, label in [*([(base, "the base")] if base is not None else []), *zip(folders, labels, strict=True)]:
        try:
            read.append(read_model(place, label))
        except CheckpointError as error:
            problems.append(str(error))
    refuse(problems)
    origin, models = read[0], read if base is None else read[1:]
    others = read[1:]
    kinds, untied = share_all(read)
    for model in read:
        problems += _of_one(model)
    floating = {n for n, h in origin.headers.items() if h.floating and not _COMPUTED.search(n)}
    merged = frozenset(n for n in floating if kinds.tied.get(n) not in origin.headers)
    copied = frozenset(origin.headers.keys() - floating)
    found = ModelInputs(origin, tuple(models), kinds, merged, copied, (), untied, ())
    rows: dict[str, Tensor | None] = {}
    notes: list[str] = []
    if untied:
        notes.append(f"some models tie {_listed(sorted(untied))} and some do not; the merged model has its own")
    tokens = None
    try:
        tokens = _tokens(origin)
    except CheckpointError as error:
        problems.append(str(error))
    for model in others:
        problems += _architecture(model, origin)
        problems += _tensors(model, found, vocabulary)
        try:
            rows[model.label], note = _rows(model, origin, tokens, vocabulary)
            notes += note
        except CheckpointError as error:
            problems.append(str(error))
        notes += _dtypes(model, found)
    refuse(problems)
    return replace(found, rows=tuple(rows.get(m.label) for m in models), notes=tuple(notes))


def refuse(problems: Sequence[str]) -> None:
    """Raise CheckpointError with all the problems, if there are any."""
    if problems:
        raise CheckpointError("these models cannot be merged:" + "".join(f"\n- {problem}" for problem in problems))


def no_space(folder: Path, needed: int) -> list[str]:
    """The problem of too little space for that many bytes more in a folder's file system, if there is one."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free >= needed:
        return []
    return [f"{folder} has {free / 1e9:.1f} GB of free space, and merging needs {needed / 1e9:.1f} GB; free some"]


def _of_one(model: StoredModel) -> list[str]:
    if "quantization_config" in model.config:
        return [f"{model.label} is quantised; merge the models before they are quantised"]
    odd = [f"{name} ({header.code})" for name, header in model.headers.items() if header.dtype is None]
    return [f"{model.label} has tensors of a dtype that cannot be merged: {_listed(odd)}"] if odd else []


def _architecture(model: StoredModel, origin: StoredModel) -> list[str]:
    problems = []
    for key in ("model_type", "architectures"):
        own, wanted = model.config.get(key), origin.config.get(key)
        if own != wanted:
            problems.append(f"{model.label} is another kind of model than {origin.label}: {key} {own}, not {wanted}")
    if problems:
        return problems
    own, wanted = dict(_flat(full_config(model))), dict(_flat(full_config(origin)))
    different = [f"{k}={own[k]!r} (not {wanted[k]!r})" for k in wanted if k in own and own[k] != wanted[k]]
    if different:
        return [f"{model.label} has another config than {origin.label}: {', '.join(different)}"]
    return []


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and not _BOOKKEEPING.match(key):
            yield from _flat(value, f"{prefix}{key}.")
        elif not _BOOKKEEPING.match(str(key)):
            yield f"{prefix}{key}", value


def _tensors(model: StoredModel, inputs: ModelInputs, vocabulary: Vocabulary) -> list[str]:
    """Missing and extra tensors, other shapes (all of them), and integers where there should be floats."""
    origin, problems = inputs.origin, []
    missing = [name for name in inputs.merged if not model.holds(name)]
    known = {*origin.headers, *origin.shared, *inputs.kinds.tied, *inputs.kinds.tied.values()}
    extra = [n for n, h in model.headers.items() if n not in known and h.floating and not _COMPUTED.search(n)]
    if missing:
        problems.append(f"{model.label} lacks tensors that {origin.label} has: {_listed(sorted(missing))}")
    if extra:
        problems.append(f"{model.label} has tensors that {origin.label} lacks: {_listed(sorted(extra))}")
    shapes, kinds = [], []
    for name in origin.headers:
        if name not in inputs.merged or not model.holds(name):
            continue
        own, wanted = model.header(name), origin.headers[name]
        by_token = vocabulary == "intersect" and inputs.is_vocabulary(name)
        if (own.shape[1:] if by_token else own.shape) != (wanted.shape[1:] if by_token else wanted.shape):
            shapes.append(f"{name} {list(own.shape)}, not {list(wanted.shape)}")
        if not own.floating and own.dtype is not None:
            kinds.append(f"{name} ({own.code}, not {wanted.code})")
    if shapes:
        problems.append(f"{model.label} has other shapes than {origin.label}: {'; '.join(shapes)}")
    if kinds:
        problems.append(f"{model.label} has integers where {origin.label} has floats: {_listed(kinds)}")
    return problems


def _rows(
    model: StoredModel, origin: StoredModel, wanted: Mapping[str, int] | None, vocabulary: Vocabulary
) -> tuple[Tensor | None, list[str]]:
    """The model's row for each of the origin's, or None for the same rows; and what to say about it."""
    own = _tokens(model)
    if own is None or wanted is None:
        if any(_sizes_differ(model, origin, name) for name in origin.headers):
            raise CheckpointError(
                f"{model.label} has another number of embeddings than {origin.label}, and without a tokenizer.json "
                "beside each of them their tokens cannot be compared"
            )
        without = " and ".join(m.label for m, ids in ((model, own), (origin, wanted)) if ids is None)
        return None, [f"the tokens of {model.label} were not compared: no tokenizer.json in {without}"]
    found = difference(wanted, own)
    if vocabulary == "error":
        if found:
            raise CheckpointError(
                f"{model.label} has another vocabulary than {origin.label}, {found}; with vocabulary='intersect' "
                "(--vocabulary intersect) the rows of shared tokens are merged and the others are the base's"
            )
        return None, []
    if not found and not any(_sizes_differ(model, origin, name) for name in origin.headers):
        return None, []
    counts = [(origin.headers[n].shape[0], model.header(n).shape[0]) for n in origin.headers
              if _is_vocabulary(origin, n) and model.holds(n)]  # fmt: skip
    if not counts:
        return None, []
    rows = rows_of(wanted, own, counts[0][0])
    rows[rows >= min(count for _, count in counts)] = -1
    said = f"{int((rows >= 0).sum())} of {len(rows)} embeddings of {model.label} are merged, the others left out"
    return rows, [f"{said} ({found})" if found else said]


def _tokens(model: StoredModel) -> dict[str, int] | None:
    try:
        return token_ids(model.folder)
    except CheckpointError as error:
        raise CheckpointError(f"{model.label}: {error}") from None


def _sizes_differ(model: StoredModel, origin: StoredModel, name: str) -> bool:
    return (
        _is_vocabulary(origin, name)
        and model.holds(name)
        and model.header(name).shape[0] != origin.headers[name].shape[0]
    )


def _is_vocabulary(model: StoredModel, name: str) -> bool:
    size = model.config.get("vocab_size") or (model.config.get("text_config") or {}).get("vocab_size") or -1
    return name in model.headers and is_vocabulary(name, model.headers[name].shape, size)


def _dtypes(model: StoredModel, inputs: ModelInputs) -> list[str]:
    pairs = {
        (model.header(name).code, inputs.origin.headers[name].code) for name in inputs.merged if model.holds(name)
    }
    changed = sorted(f"{own}, not {wanted}" for own, wanted in pairs if own != wanted)
    return [f"{model.label} is stored in another dtype than {inputs.origin.label}: {'; '.join(changed)}"] * bool(
        changed
    )


def _listed(items: Sequence[str], most: int = 20) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
