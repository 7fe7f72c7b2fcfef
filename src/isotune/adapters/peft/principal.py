"""LoRAs that start from parts of the weight: PEFT computes the start anew, or takes the adapter as a plain LoRA."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from isotune.adapters.peft.lora import LoRADialect
from isotune.adapters.settings import Settings
from isotune.errors import OptionError


class PrincipalDialect(LoRADialect):
    """Everything but the start is as in plain LoRA."""

    def config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return super().config({path: s.as_lora() for path, s in settings.items()})

    def read(self, config: dict[str, Any], path: str) -> Settings:
        return super().read({**config, "init_lora_weights": True}, path)


class PiSSADialect(PrincipalDialect):
    """The `niter` of its start is in the name of the start."""

    def claims(self, config: dict[str, Any]) -> bool:
        return _niter(config) is not None

    def read(self, config: dict[str, Any], path: str) -> Settings:
        # PEFT draws a randomised start anew, and differently, whenever it loads one: no two of its models are equal
        # to the bit, and this one is none of them, but as near.
        niter = _niter(config)
        plain = super().read(config, path)
        return self.settings(**plain.model_dump(exclude={"niter"}), niter=int(niter) if niter else None)


class OLoRADialect(PrincipalDialect):
    """Named by its start."""

    def claims(self, config: dict[str, Any]) -> bool:
        return str(config.get("init_lora_weights")).lower() == "olora"


class CorDADialect(PrincipalDialect):
    """Named by its start, which PEFT does not store."""

    def claims(self, config: dict[str, Any]) -> bool:
        return str(config.get("init_lora_weights")).startswith("corda")

    def read(self, config: dict[str, Any], path: str) -> Settings:
        raise OptionError(
            "corda: PEFT's folder does not hold what its start was computed from, so that neither PEFT nor isotune "
            "can load it without that data; store it in PEFT as a plain LoRA, with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...), and load that"
        )


class SORSADialect(PrincipalDialect):
    """A LoRA in PEFT; the singular values are ours."""

    own_tensors = frozenset({"lora_B_trained", "lora_sigma"})


def _niter(config: dict[str, Any]) -> str | None:
    """The iterations that a PEFT config names ("" for the full SVD), None where it is no PiSSA."""
    found = re.fullmatch(r"pissa(?:_niter_(\d+))?", str(config.get("init_lora_weights")))
    return (found.group(1) or "") if found else None
