"""What an adapter stores of its base: name, task, and the configuration, compared field by field."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

from torch import nn

from isotune.bare import bare_class
from isotune.model.names import unwrapped

Recorded = Mapping[str, Any] | str
"""The fields of a configuration; of adapters of version 0.1.0 a digest of it; empty where there is none."""

# They say how a model is run, trained, drawn or labelled, and nothing of what its weights mean.
_OTHER_FIELDS = (
    "_*", "*_token_id", "*_token_index", "transformers_version", "dtype", "torch_dtype", "architectures",
    "use_cache", "id2label", "label2id", "num_labels", "problem_type", "quantization_config", "tokenizer_class",
    "*dropout*", "*drop_rate", "*layerdrop", "*_drop", "*_pdrop", "output_*", "return_dict", "use_return_dict",
    "torchscript", "*attn_implementation*", "chunk_size_feed_forward", "gradient_checkpointing", "initializer_*",
    "*_init_std", "max_position_embeddings", "n_positions", "pretraining_tp", "router_aux_loss_coef",
    "router_jitter_noise", "*_loss_weight", "task_specific_params", "finetuning_task", "mask_time_*",
    "mask_feature_*", "apply_spec_augment", "tie_word_embeddings",
)  # fmt: skip
_FORMER_FIELDS = ("transformers_version", "dtype", "torch_dtype", "architectures", "use_cache", "id2label",
                  "label2id", "problem_type", "quantization_config")  # fmt: skip
_TASK_TYPES = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
LABELLED = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}
"""The tasks that have labels, with the class of transformers that opens their models."""


@dataclass(frozen=True)
class BaseRecord:
    """What an adapter says of the model that it was made for, as far as that is known."""

    name: str | None = None
    """The name or path under which it was loaded."""
    config: Recorded = ""
    """See `base_config`."""
    task_type: str | None = None
    """What PEFT calls its task, by which it finds the class that opens the base."""
    labels: list[str] = field(default_factory=list)
    """Of a classifier, the names of its labels in the order of their numbers."""

    @classmethod
    def of(cls, model: nn.Module, name: str | None = None) -> BaseRecord:
        """The record of a model, adapted or not."""
        config: Any = getattr(unwrapped(model), "config", None)
        own = name or getattr(config, "_name_or_path", None) or None
        own = None if own is None else str(own)  # diffusers keeps a path as it was given
        task = task_type([bare_class(unwrapped(model)).__name__])
        labels = list(config.id2label.values()) if task in LABELLED and getattr(config, "id2label", None) else []
        return cls(own, base_config(model), task, labels)


def base_config(model: nn.Module) -> dict[str, Any]:
    """The fields of the model's configuration that say what its weights mean; of a model without one, none.

    Nested configurations are written out, with dots in the names of their fields.
    """
    return dict(_fields(_config(model)))


def task_type(architectures: Iterable[str]) -> str | None:
    """What PEFT calls the task of models of these classes; None where it has no word for it."""
    return next((task for name in architectures for end, task in _TASK_TYPES.items() if name.endswith(end)), None)


def differences(one: Mapping[str, Any], two: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The fields in which two configurations differ, with both values.

    One that only one of them has is none: another version of transformers may have added it.
    """
    return {key: (one[key], two[key]) for key in one if key in two and one[key] != two[key]}


def former_digest(model: nn.Module) -> str:
    """What version 0.1.0 stored: a digest of the configuration, fields that decide nothing included."""
    fields = {
        key: value
        for key, value in _config(model).items()
        if key not in _FORMER_FIELDS and not key.startswith("_") and not key.endswith("_token_id")
    }
    return hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()[:16] if fields else ""


def _config(model: nn.Module) -> dict[str, Any]:
    own: Any = unwrapped(model)
    config: Any = getattr(own, "base_config", None) or getattr(own, "config", None)
    return config.to_dict() if hasattr(config, "to_dict") else {}


def _fields(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in sorted(config.items()):
        if any(fnmatch(str(key), pattern) for pattern in _OTHER_FIELDS):
            continue
        if isinstance(value, Mapping):
            yield from _fields(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.loads(json.dumps(value, default=str))
