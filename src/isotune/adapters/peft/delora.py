"""DeLoRA in PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from isotune.adapters.peft.dialect import Dialect, NotInPEFTError
from isotune.adapters.peft.patterns import common_and_rest, value_at
from isotune.adapters.settings import Settings
from isotune.sites import Site


class DeLoRADialect(Dialect):
    """Rank and boundary by layer, one dropout."""

    peft_type = "DELORA"

    def config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        dropouts = {s.dropout for s in settings.values()}
        if len(dropouts) > 1:
            raise NotInPEFTError("PEFT's DeLoRA has one dropout for all layers")
        rank, rank_pattern = common_and_rest({path: s.rank for path, s in settings.items()})
        boundary, lambda_pattern = common_and_rest({path: s.boundary for path, s in settings.items()})
        return {
            "r": rank, "delora_lambda": boundary, "rank_pattern": rank_pattern, "lambda_pattern": lambda_pattern,
            "module_dropout": dropouts.pop(), "bias": "none", "init_weights": True,
        }  # fmt: skip

    def refused(self, site: Site) -> str | None:
        return None if site.kind == "linear" else f"is of the kind {site.kind}, which PEFT's DeLoRA does not adapt"

    def read(self, config: dict[str, Any], path: str) -> Settings:
        return self.settings(
            rank=value_at(config.get("rank_pattern") or {}, path, config["r"]),
            boundary=value_at(config.get("lambda_pattern") or {}, path, config["delora_lambda"]),
            dropout=config.get("module_dropout", 0.0),
        )
