"""Which tensors of full models are one: heads that are tied to embeddings, in all of the models or in some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from isotune.checkpoint.stored_models import StoredModel
from isotune.checkpoint.tensor_kinds import Kinds, tensor_kinds


def share_all(models: Sequence[StoredModel]) -> tuple[Kinds, frozenset[str]]:
    """Let every model have the names that it ties; the kinds of the first, and what is not tied in all of them."""
    origin = models[0]
    kinds, by_ties = _kinds(origin), _ties(origin)
    ties = [kinds.tied if _ties(model) == by_ties else _kinds(model).tied for model in models]
    untied = {alias for own in ties for alias in own if any(alias not in other for other in ties)}
    for model, own in zip(models, ties, strict=True):
        _share(model, origin, own)
    for alias in untied & origin.shared.keys():
        source = origin.shared[alias]
        origin.headers[alias], origin.file_of[alias] = origin.headers[source], origin.file_of[source]
    tied = {alias: source for alias, source in kinds.tied.items() if alias not in untied}
    return replace(kinds, tied=tied), frozenset(untied)


def _kinds(model: StoredModel) -> Kinds:
    return tensor_kinds(model.folder, model.config, {n: h.shape for n, h in model.headers.items()})


def _ties(model: StoredModel) -> bool:
    """Whether its config ties the head to the embeddings."""
    return bool(full_config(model).get("tie_word_embeddings"))


def _share(model: StoredModel, origin: StoredModel, tied: Mapping[str, str]) -> None:
    """Find, for tied names, the one that the model stores, and further copies of it."""
    groups: dict[str, list[str]] = {}
    for alias, source in tied.items():
        groups.setdefault(source, [source]).append(alias)
    for group in groups.values():
        stored = [name for name in group if name in model.headers]
        kept = next((name for name in group if name in origin.headers), group[0])
        if stored:
            own = kept if kept in stored else stored[0]
            model.shared |= {name: own for name in group if name not in stored}
            model.copies[kept] = [name for name in stored if name != own]


def full_config(model: StoredModel) -> Mapping[str, Any]:
    """The config with the defaults of what it does not say, where transformers knows them."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model.folder).to_dict()
    except Exception:  # a model type that this version of transformers does not know
        return model.config
