"""LoRA, and what PEFT writes as one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from isotune.adapters.peft.dialect import Dialect, NotInPEFTError
from isotune.adapters.peft.patterns import common_and_rest, value_at
from isotune.adapters.settings import Settings
from isotune.errors import OptionError


class LoRADialect(Dialect):
    """PEFT's LoRA; also of methods whose adapters are one, however they start or train."""

    peft_type = "LORA"
    prefix = "lora_"

    def config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        if len({(s.rslora, s.dropout) for s in settings.values()}) > 1:
            raise NotInPEFTError("PEFT's LoRA has one kind of scaling and one dropout for all layers")
        first = next(iter(settings.values()))
        rank, rank_pattern = common_and_rest({path: s.rank for path, s in settings.items()})
        alpha, alpha_pattern = common_and_rest({path: s.resolved_alpha for path, s in settings.items()})
        return {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": rank_pattern,
            "alpha_pattern": alpha_pattern,
            "use_rslora": first.rslora,
            "lora_dropout": first.dropout,
            "bias": "none",
            "init_lora_weights": True,
        }

    def read(self, config: dict[str, Any], path: str) -> Settings:
        unsupported = ("use_dora", "lora_bias", "layer_replication", "target_parameters", "trainable_token_indices",
                       "alora_invocation_tokens", "use_qalora", "corda_config", "eva_config", "arrow_config",
                       "velora_config")  # fmt: skip
        asked = [f"{name}={config[name]!r}" for name in unsupported if config.get(name)]
        if config.get("init_lora_weights", True) not in (True, False, "gaussian", "orthogonal", "eva"):
            # Such a start also changes the base weight, which an adapter folder does not hold.
            asked.append(f"init_lora_weights={config['init_lora_weights']!r}")
        if asked:
            name = self.method.name
            raise OptionError(f"{name}: this PEFT adapter uses {', '.join(asked)}, which {name} cannot express")
        return self.settings(
            rank=value_at(config.get("rank_pattern") or {}, path, config["r"]),
            alpha=value_at(config.get("alpha_pattern") or {}, path, config["lora_alpha"]),
            rslora=config.get("use_rslora", False),
            dropout=config.get("lora_dropout", 0.0),
        )


class DoRADialect(LoRADialect):
    """A LoRA with `use_dora`."""

    def config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return super().config(settings) | {"use_dora": True}

    def claims(self, config: dict[str, Any]) -> bool:
        return bool(config.get("use_dora"))

    def read(self, config: dict[str, Any], path: str) -> Settings:
        return super().read({**config, "use_dora": False}, path)
