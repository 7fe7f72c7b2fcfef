"""Pretrained models with a head that classifies: the architecture's own class wherever it has one.

So a trained classifier is what transformers, PEFT and servers expect, with the base's own names. Only a pooling that
this class does not have takes one of ours, `PooledForSequenceClassification`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.auto import modeling_auto

from isotune.errors import IsotuneError
from isotune.training.modeling_pooled import PooledConfig, PooledForSequenceClassification, backbone_options
from isotune.training.models import check_whole, locate, open_pretrained, read_config

AutoConfig.register(PooledConfig.model_type, PooledConfig, exist_ok=True)
AutoModelForSequenceClassification.register(PooledConfig, PooledForSequenceClassification, exist_ok=True)


class Head(NamedTuple):
    """Where a classifier's head is."""

    logits: str
    """The path of the layer that makes the logits, the last above the backbone."""
    trained: list[str]
    """Those of the modules that are trained in full: this layer, and what the weights did not have."""


OWN = "own"
"""The pooling of the architecture's own class, whatever it is."""


def load_classifier(
    name: str,
    labels: Sequence[str],
    pooling: str = "auto",
    dtype: str = "float32",
    backbone: str | None = None,
    of_tokens: bool = False,
    quantization: str | None = None,
) -> Any:
    """A pretrained model that classifies; its head is drawn where the model has none for as many labels.

    Args:
        name: What `locate` finds; the folder of a model that already classifies, too.
        labels: Their names, in the order of their numbers; none for a regression, which has one output.
        pooling: "auto", `OWN`, or "mean", "cls", "last", for which the architecture's own class is taken where it
            pools like that, and else `PooledForSequenceClassification`.
        dtype: Of the backbone.
        backbone: The backbone's name within a class of ours; by default what the architecture's own class has.
        quantization: How the backbone is quantised, as `open_pretrained` takes it.
        of_tokens: Whether each token is classified, by the architecture's own class for it.

    Returns:
        The model; `head_paths` says what of it is to be trained in full.

    Raises:
        IsotuneError: There is no such model, it has no weights, or it is an encoder-decoder.
    """
    path = locate(name)
    config = read_config(name, path)
    said = _named(labels or ["LABEL_0"])
    if of_tokens:
        if config.model_type not in modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES:
            raise IsotuneError(f"{name}: transformers has no class of {config.model_type} models that tags tokens")
        return _own_class(AutoModelForTokenClassification, name, path, dtype, quantization, said)
    said["problem_type"] = "single_label_classification" if labels else "regression"
    if config.model_type == PooledConfig.model_type:
        model, _ = open_pretrained(PooledForSequenceClassification, name, path, dtype)
        return _marked(model, [])
    if config.is_encoder_decoder:
        raise IsotuneError(f"{name}: classification needs an encoder or a decoder, not an encoder-decoder")
    own = _own_options(config, pooling) if backbone is None else None
    if own is not None:
        return _own_class(AutoModelForSequenceClassification, name, path, dtype, quantization, {**own, **said})
    base, drawn = open_pretrained(AutoModel, name, path, dtype, quantization, **backbone_options(config))
    _check_drawn(base, drawn, name)
    chosen = _pooling_of(Path(path), config.model_type) if pooling in ("auto", OWN) else pooling
    prefix = backbone or base.base_model_prefix or "backbone"
    return _marked(PooledForSequenceClassification(PooledConfig(base.config, chosen, prefix, **said), base), [])


def _own_class(kind: Any, name: str, path: str, dtype: str, quantization: str | None, options: dict[str, Any]) -> Any:
    """A model of the architecture's own class, its head marked; what of it the weights do not have is drawn."""
    model, drawn = open_pretrained(kind, name, path, dtype, quantization, **options, ignore_mismatched_sizes=True)
    _check_drawn(model, drawn, name)
    model.accepts_loss_kwargs = False  # its loss is a mean over the batch, whatever the Trainer passes
    return _marked(model, drawn)


def _named(labels: Sequence[str]) -> dict[str, Any]:
    """The labels as a configuration has them."""
    names = dict(enumerate(labels))
    return {"id2label": names, "label2id": {label: number for number, label in names.items()}}


_SENSES: dict[str, tuple[Any, Any]] = {
    "images": (AutoModelForImageClassification, modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES),
    "sound": (AutoModelForAudioClassification, modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES),
}


def load_classifier_of(
    what: str, name: str, labels: Sequence[str], dtype: str = "float32", quantization: str | None = None
) -> Any:
    """A pretrained model of "images" or "sound" with a head for these labels, drawn where it has none for as many.

    Raises IsotuneError where there is no such model, or transformers has no class of its kind that classifies these.
    """
    kind, known = _SENSES[what]
    path = locate(name)
    config = read_config(name, path)
    if config.model_type not in known:
        raise IsotuneError(f"{name}: transformers has no class of {config.model_type} models that classifies {what}")
    said = {**_named(labels), "num_labels": len(labels)}  # which configurations of timm's models do not count
    model = _own_class(kind, name, path, dtype, quantization, said)
    if hasattr(model.config, "label_names"):  # timm's models are saved with these, and not with id2label
        model.config.label_names = list(labels)
    return model


def is_classifier(model: nn.Module) -> bool:
    """Whether the model is one of `load_classifier`."""
    return hasattr(model, "isotune_head")


def pooling_of(model: Any) -> str:
    """What `load_classifier` is given to open the same model again."""
    return str(model.config.pooling) if isinstance(model, PooledForSequenceClassification) else OWN


def head_paths(model: Any) -> list[str]:
    """The paths of the modules that are trained in full."""
    return list(model.isotune_head.trained)


def logits_layer(model: Any) -> nn.Linear:
    """The linear layer that makes the logits; of one that is trained in full the copy in use."""
    found: nn.Linear = attrgetter(model.isotune_head.logits)(model)
    return found


@contextmanager
def features_as_logits(model: nn.Module) -> Iterator[None]:
    """Let the model answer with what its last linear layer reads, shape (batch, width), in place of its logits."""
    handle = logits_layer(model).register_forward_hook(lambda layer, given, logits: given[0])
    try:
        yield
    finally:
        handle.remove()


def _own_options(config: Any, pooling: str) -> dict[str, str] | None:
    """What makes the architecture's own class pool like that; None where it cannot."""
    kind = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    if kind is None:
        return None
    if hasattr(config, "classifier_pooling") and pooling in ("mean", "cls"):
        return {"classifier_pooling": pooling}
    last = pooling == "last" and issubclass(kind, GenericForSequenceClassification)
    return {} if pooling in ("auto", OWN) or last else None


def _check_drawn(model: Any, drawn: Sequence[str], name: str) -> None:
    """Raise IsotuneError where more than a head, or a pooling layer, is missing."""
    prefix = f"{model.base_model_prefix}." if model.base_model is not model else ""
    if not prefix and hasattr(model, "encoder"):  # Whisper's classifier of sound, which has it beside its head
        prefix = "encoder."
    head = f"{_head_within(model)}."
    below = [key for key in drawn if key.startswith(prefix) and not key.startswith(head)]
    check_whole(name, [key for key in below if "pooler." not in key])


def _marked(model: Any, drawn: Sequence[str]) -> Any:
    """The model, with the paths of its head: as high up as everything below is new."""
    names = [name for name, _ in model.named_parameters()]
    path = _logits_path(model)
    new = {name for name in names if name in drawn or name.startswith(f"{path}.")}
    model.isotune_head = Head(path, sorted({_highest(name, names, new) for name in new}))
    return model


def _highest(name: str, names: Sequence[str], new: set[str]) -> str:
    path = name.rpartition(".")[0]
    while (above := path.rpartition(".")[0]) and all(n in new for n in names if n.startswith(f"{above}.")):
        path = above
    return path


def _head_within(model: Any) -> str:
    """The path of the head where it is a part of the backbone, as in timm's models; empty where it lies above.

    Raises IsotuneError where it is no one linear layer.
    """
    ask = getattr(model.base_model, "get_classifier", None)
    if ask is None:
        return ""
    head = ask()
    if not isinstance(head, nn.Linear):
        found = "several heads" if isinstance(head, tuple) else f"a {type(head).__name__}"
        raise IsotuneError(
            f"a {type(model.base_model).__name__} classifies by {found}, where this task needs one linear layer as "
            "its head; choose another architecture"
        )
    return next(path for path, module in model.named_modules() if module is head)


def _logits_path(model: Any) -> str:
    if head := _head_within(model):
        return head
    inside = f"{model.base_model_prefix}." if not isinstance(model, PooledForSequenceClassification) else "."
    return [
        path
        for path, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
        and layer.out_features == model.config.num_labels
        and not path.startswith(inside)
    ][-1]


def _pooling_of(path: Path, model_type: str) -> str:
    """What the model was trained with where it says so; else mean for encoders and last for decoders."""
    file = path / "1_Pooling" / "config.json"
    if file.is_file():
        said = json.loads(file.read_text(encoding="utf-8"))
        modes = {"pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "last"}
        named = {"cls": "cls", "lasttoken": "last"}.get(said.get("pooling_mode", ""), "mean")
        return next((mode for key, mode in modes.items() if said.get(key)), named)
    decoder_only = (
        model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and model_type not in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    )
    return "last" if decoder_only else "mean"
