"""AdaLoRA in PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from isotune.adapters.peft.dialect import Dialect, other_kind
from isotune.adapters.settings import Settings
from isotune.errors import OptionError
from isotune.sites import LINEAR, Site

_STEPS = 1000
"""PEFT asks for a number of steps; without one the schedule is told as shares of so many."""


class AdaLoRADialect(Dialect):
    """One set of options for all layers. PEFT's penalty is a mean over matrices: its weight is not carried over."""

    peft_type = "ADALORA"
    prefix = "lora_"

    def config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        own = self.same(settings)
        return {
            "init_r": own.rank,
            "target_r": max(1, round(own.keep * own.rank)),
            "lora_alpha": own.alpha or own.rank + 1e-5,
            "lora_dropout": own.dropout,
            "tinit": round(own.warmup * _STEPS),
            "tfinal": round(own.final * _STEPS),
            "deltaT": own.interval,
            "beta1": own.beta1,
            "beta2": own.beta2,
            "total_step": _STEPS,
            "bias": "none",
        }

    def refused(self, site: Site) -> str | None:
        return other_kind(site, *LINEAR)

    def read(self, config: dict[str, Any], path: str) -> Settings:
        if config.get("use_rslora"):
            raise OptionError("adalora: PEFT's use_rslora has no effect on AdaLoRA; set it to false")
        steps = config.get("total_step") or _STEPS
        return self.settings(
            rank=config["init_r"],
            keep=min(1.0, config["target_r"] / config["init_r"]),
            alpha=float(config["lora_alpha"]),
            dropout=config.get("lora_dropout", 0.0),
            warmup=config.get("tinit", 0) / steps,
            final=config.get("tfinal", 0) / steps,
            interval=config.get("deltaT", 1),
            beta1=config.get("beta1", 0.85),
            beta2=config.get("beta2", 0.85),
        )
