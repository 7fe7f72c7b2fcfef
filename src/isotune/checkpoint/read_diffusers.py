"""LoRAs as diffusers' training scripts write them: one file for the parts of a pipeline, under names of their own."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor

from isotune.adapters.peft.patterns import common_and_rest
from isotune.checkpoint.files import check_finite, read_tensors
from isotune.checkpoint.stored import PREFIX
from isotune.errors import CheckpointError

FILE = "pytorch_lora_weights.safetensors"
_PARTS = re.compile(r"(unet|transformer(?:_\d)?|text_encoder(?:_\d)?|prior|controlnet)\.")
_DOWN_UP = {"down": "lora_A", "up": "lora_B", "A": "lora_A", "B": "lora_B"}
_CONVERT = "open it with the pipeline's load_lora_weights and write it anew with its save_lora_weights"


def diffusers_file(path: Path) -> Path | None:
    """The file of diffusers that `path` is, or that lies in it; None where there is none."""
    if path.is_dir():
        path = path / FILE
    return path if path.name == FILE and path.is_file() else None


def read_diffusers(file: Path, known: Collection[str] | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The LoRA of one part of the pipeline, as PEFT's config and tensors.

    Args:
        file: The file.
        known: The paths of a model's modules, by which the part is chosen that fits it. Without them the file must
            hold one part alone.

    Raises CheckpointError for a damaged file, other names than diffusers', or several parts of which none is chosen.
    """
    tensors, metadata = read_tensors(file)
    check_finite(tensors, file)
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        found = _PARTS.match(key)
        parts.setdefault(found.group(1) if found else "", {})[key[found.end() :] if found else key] = tensor
    loras = {part: _in_peft_names(file, part, tensors) for part, tensors in parts.items()}
    part = _chosen(file, loras, known)
    own, alphas = loras[part]
    return _config(own, alphas, _described(file, part, metadata)), own


def _in_peft_names(file: Path, part: str, found: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The tensors under PEFT's names, and the alphas that stand beside them, by layer."""
    own, alphas = {}, {}
    for key, tensor in found.items():
        if key.endswith(".alpha"):
            alphas[_layer(key.removesuffix(".alpha"), part)] = tensor.item()
        elif magnitude := re.fullmatch(r"(.+)\.lora_magnitude_vector(?:\.weight)?", key):
            own[f"{PREFIX}{_layer(magnitude.group(1), part)}.lora_magnitude_vector"] = tensor
        elif factor := re.fullmatch(r"(.+?)(?:\.lora_|[._]lora\.|\.lora_linear_layer\.)(down|up|A|B)\.weight", key):
            layer, side = factor.groups()
            own[f"{PREFIX}{_layer(layer, part)}.{_DOWN_UP[side]}.weight"] = tensor
        else:
            raise CheckpointError(
                f"{file} holds {key!r}, which is no tensor of a LoRA in diffusers' names. Where another trainer "
                f"wrote it, {_CONVERT}"
            )
    return own, alphas


def _layer(name: str, part: str) -> str:
    """The path of a layer, of which earlier versions of diffusers had a processor with names of its own."""
    name = name.replace(".processor.", ".")
    if part.startswith("text_encoder"):
        return re.sub(r"\.to_(q|k|v|out)$", r".\1_proj", name)
    return re.sub(r"\.to_out$", ".to_out.0", name)


def _chosen(file: Path, loras: dict[str, Any], known: Collection[str] | None) -> str:
    layers = {
        part: {key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in own} for part, (own, _) in loras.items()
    }
    fitting = [part for part, paths in layers.items() if known is None or paths <= set(known)]
    if len(fitting) == 1 or len(loras) == 1:
        return fitting[0] if fitting else next(iter(loras))
    raise CheckpointError(
        f"{file} holds LoRAs for {', '.join(sorted(loras))} of a pipeline, of which "
        + ("none fits this model" if known is not None else "one has to be chosen: load it onto that model")
        + "; isotune.load(pipeline.unet, ...) takes the one of the unet"
    )


def _described(file: Path, part: str, metadata: dict[str, str]) -> dict[str, Any]:
    """PEFT's config of the part, which later versions of diffusers write into the file."""
    try:
        found = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        return {key.removeprefix(f"{part}."): value for key, value in found.items() if key.startswith(f"{part}.")}
    except (ValueError, AttributeError):
        raise CheckpointError(f"the header of {file} is damaged; restore the file from its source") from None


def _config(own: dict[str, Tensor], alphas: dict[str, float], described: dict[str, Any]) -> dict[str, Any]:
    ranks = {
        key.removeprefix(PREFIX).removesuffix(".lora_A.weight"): len(A) for key, A in own.items() if ".lora_A." in key
    }
    rank, rank_pattern = common_and_rest(ranks)
    alpha, alpha_pattern = common_and_rest({layer: alphas.get(layer, float(ranks[layer])) for layer in ranks})
    guessed = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {re.escape(layer): own for layer, own in rank_pattern.items()},
        "alpha_pattern": {re.escape(layer): own for layer, own in alpha_pattern.items()},
        "use_dora": any(key.endswith("magnitude_vector") for key in own),
    }
    return {**guessed, **described, "peft_type": "LORA"}
