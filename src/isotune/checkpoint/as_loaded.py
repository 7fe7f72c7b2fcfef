"""A model folder's tensors under the names that they have in the model, where transformers renames or joins them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Sources = list[tuple[str, str]]  # the keys of files that make up a tensor, each with the pattern that it matches


class AsLoaded:
    """What `from_pretrained` would make of the tensors of a folder, one at a time and without their model.

    The model is laid out on the meta device; transformers' own rules say which tensors of the files become which of
    its tensors. Empty where transformers does not know the model, or has no such rules (before version 5).
    """

    def __init__(self, model: Any, keys: Collection[str]) -> None:
        """`model`: one without values, of `laid_out`; `keys`: the names in its files."""
        self.model = model
        self.sources: dict[str, Sources] = {}
        self.made_by: dict[str, tuple[str, Any]] = {}
        """By name the first name and the converter of the tensors that are made together."""
        self.last: dict[str, Tensor] = {}
        """What was made last: experts that were made one tensor are asked for one by one."""
        if self.model is not None:
            self._find(keys)

    def __contains__(self, name: object) -> bool:
        return name in self.sources or name in self.made_by

    def tensor(self, name: str, read: Callable[[str], Tensor]) -> Tensor:
        """The tensor of that name, made of those that `read` gives for the keys of the files."""
        if name not in self.made_by:
            ((key, _),) = self.sources[name]
            return read(key)
        if name in self.last:
            return self.last[name]
        first, converter = self.made_by[name]
        converter = copy.deepcopy(converter)
        for key, pattern in self.sources[first]:
            converter.add_tensor(first, key, pattern, read(key))
        made = converter.convert(first, model=self.model, config=self.model.config)
        self.last = {own: tensor[0] if isinstance(tensor, list) else tensor for own, tensor in made.items()}
        return self.last[name]

    def _find(self, keys: Collection[str]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        rules = get_model_conversion_mapping(self.model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        named = self.model.state_dict()
        for key in sorted(keys, key=dot_natural_key):
            prefix = self.model.base_model_prefix
            name, pattern = rename_source_key(key, renamings, converters, prefix, named)
            if name not in named and key in named:
                name, pattern = key, None
            self.sources.setdefault(name, []).append((key, pattern or key))
            if pattern is not None:
                converter = next(rule for rule in converters if pattern in rule.source_patterns)
                for target in converter.target_patterns:
                    own = name.replace(converter.target_patterns[0], target)
                    self.made_by.setdefault(own, (name, converter))
        for tied, own in self.model.all_tied_weights_keys.items():
            if tied not in self and own in self.sources:
                self.sources[tied] = self.sources[own]


def laid_out_as(kind: type, config: Any) -> Any:
    """A model of this class of transformers without values, or None where it cannot be had."""
    if config is None:
        return None
    try:
        import transformers.conversion_mapping  # (absent before transformers 5)

        if not issubclass(kind, transformers.PreTrainedModel):  # diffusers' models have configs, too
            return None
        with torch.device("meta"):
            return kind(copy.deepcopy(config))
    except Exception:  # as many kinds as there are models: their code runs here
        return None


def laid_out(folder: Path) -> Any:
    """The model of a folder without values, or None where it cannot be had."""
    try:
        import transformers

        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        return laid_out_as(getattr(transformers, (config.architectures or [""])[0]), config)
    except Exception:  # a file that is damaged, or that only code from elsewhere could read
        return None
