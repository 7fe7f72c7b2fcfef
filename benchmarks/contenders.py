"""Who is compared: the frozen layer, and adapters of PEFT's and of ours on the same layer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import peft
from torch import nn

import isotune
from isotune.adapters.peft.dialect import NotInPEFTError, dialect_of
from isotune.adapters.registry import method_class
from isotune.errors import OptionError

CONTENDERS = (
    "frozen",
    "peft-lora",
    "isotune-lora",
    "peft-hra",
    "isotune-hra",
    "peft-oft",
    "peft-boft",
    "peft-lora-bf16",
)
REFERENCE = "peft-lora"
LOW_PRECISION_ONLY = "peft-lora-bf16"
"""PEFT keeps adapters in fp32 on a bf16 model; this one, without that, says what bf16 adapters cost."""

PEFTS = "peft's "
"""Before the name of a method: PEFT's own form of it, with the options of ours."""

OFT_BLOCK, BOFT_BLOCK, BOFT_FACTORS = 32, 8, 2
"""PEFT's default for OFT, and the BOFT of its paper's language tasks; neither has a rank."""


def contenders(low_precision: bool = False) -> list[str]:
    """The names that take part."""
    return [name for name in CONTENDERS if low_precision or name != LOW_PRECISION_ONLY]


def attach(name: str, model: nn.Module, rank: int, targets: Sequence[str]) -> nn.Module:
    """Put the adapter called `name` on the layers at `targets`, in place; returns what a user would then call."""
    if name == "frozen":
        return model.requires_grad_(False)
    if name.startswith("isotune-"):
        return isotune.adapt(model, settings_of(name.removeprefix("isotune-"), rank), list(targets), seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = _peft_config(name, rank, list(targets))
        return peft.get_peft_model(model, config, autocast_adapter_dtype=name != LOW_PRECISION_ONLY)


def settings_of(method: str, rank: int) -> isotune.Settings:
    """The method at its defaults, of this rank where it has one and takes it."""
    if "rank" not in method_class(method).model_fields:
        return isotune.method(method)
    try:
        return isotune.method(method, rank=rank)
    except OptionError:
        return isotune.method(method)


def peft_form(settings: isotune.Settings) -> dict[str, Any] | None:
    """The fields of PEFT's config for the same method with the same options; None where PEFT has no such form."""
    dialect = dialect_of(type(settings))
    try:
        return {"peft_type": dialect.peft_type, **dialect.config({"layer": settings})}
    except NotInPEFTError:
        return None


def _peft_config(name: str, rank: int, targets: list[str]) -> peft.PeftConfig:
    if name.startswith(PEFTS):
        fields = peft_form(settings_of(name.removeprefix(PEFTS), rank)) or {}
        kind = peft.PEFT_TYPE_TO_CONFIG_MAPPING[fields.pop("peft_type")]
        return kind(**{**fields, "target_modules": targets})
    if name.startswith("peft-lora"):
        return peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
    if name == "peft-hra":
        return peft.HRAConfig(r=rank, target_modules=targets)
    if name == "peft-oft":
        return peft.OFTConfig(oft_block_size=OFT_BLOCK, target_modules=targets)
    return peft.BOFTConfig(boft_block_size=BOFT_BLOCK, boft_n_butterfly_factor=BOFT_FACTORS, target_modules=targets)


LONGEST_CALL = 12.0
LARGEST_SAVED = 10 * 2**30


def too_costly(name: str, n_in: int, rank: int, element: int = 4, device: str = "cpu") -> str | None:
    """Why a contender is left out of a case before it is tried, for a layer with `n_in` columns; else None.

    PEFT's HRA keeps about r matrices of in x in for backward, and its BOFT multiplies dense in x in matrices.
    The speeds are rough ones of two CPU cores; a GPU is held to the memory only.
    """
    size, seconds = 0, 0.0
    if name == "peft-hra":
        size, seconds = rank * n_in**2 * element, rank * n_in**2 * 1e-8
    elif name == "peft-boft":
        seconds = n_in**3 * 2e-10
    if size > LARGEST_SAVED:
        return f"left out: it would save {size / 2**30:.0f} GiB for backward"
    if seconds > LONGEST_CALL and device == "cpu":
        return f"left out: it would take some {seconds:.0f} s a call"
    return None
