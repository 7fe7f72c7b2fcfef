"""MiSS, and BAT, which PEFT has as one of its starts; both were called Bone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from isotune.adapters.peft.dialect import Dialect, other_kind
from isotune.adapters.settings import Settings
from isotune.sites import Site


class MiSSDialect(Dialect):
    """One set of options for all layers."""

    peft_type = "MISS"
    prefix = "miss_"
    aliases: ClassVar[dict[str, str]] = {"BONE": "bone_"}

    def config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        own = self.same(settings)
        return {
            "r": own.rank,
            "miss_dropout": own.dropout,
            "mini_r": own.mini or 1,
            "init_weights": "mini" if own.mini else True,
            "bias": "none",
        }

    def refused(self, site: Site) -> str | None:
        return other_kind(site, "linear")

    def read(self, config: dict[str, Any], path: str) -> Settings:
        return self.settings(
            rank=config["r"],
            mini=config["mini_r"] if config.get("init_weights") == "mini" else None,
            dropout=config.get("miss_dropout", 0.0),
        )


class BATDialect(MiSSDialect):
    """MiSS with the start "bat"."""

    def config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {"r": self.same(settings).rank, "init_weights": "bat", "bias": "none"}

    def claims(self, config: dict[str, Any]) -> bool:
        return config.get("init_weights") == "bat"

    def read(self, config: dict[str, Any], path: str) -> Settings:
        return self.settings(rank=config["r"])
