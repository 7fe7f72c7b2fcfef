"""HiRA and LoHa in PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from isotune.adapters.peft.dialect import Dialect, other_kind
from isotune.adapters.peft.patterns import common_and_rest, value_at
from isotune.adapters.settings import Settings
from isotune.errors import OptionError
from isotune.sites import LINEAR, Site


class HiRADialect(Dialect):
    """One set of options for all layers: PEFT 0.21 has a `rank_pattern` and does not look at it."""

    peft_type = "HIRA"
    prefix = "hira_"

    def config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        own = self.same(settings)
        return {"r": own.rank, "hira_dropout": own.dropout, "init_weights": True}

    def refused(self, site: Site) -> str | None:
        if getattr(site.layer, "groups", 1) > 1:
            return "is a convolution in groups, which PEFT's HIRA does not adapt"
        return other_kind(site, *LINEAR, "embedding", "conv1d", "conv2d", "conv3d")

    def read(self, config: dict[str, Any], path: str) -> Settings:
        return self.settings(rank=config["r"], dropout=config.get("hira_dropout", 0.0))


class LoHaDialect(Dialect):
    """Ranks and scales may differ from layer to layer; a convolution's kernel is one matrix."""

    peft_type = "LOHA"
    prefix = "hada_"

    def config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        rank, rank_pattern = common_and_rest({path: s.rank for path, s in settings.items()})
        alpha, alpha_pattern = common_and_rest({path: s.resolved_alpha for path, s in settings.items()})
        return {
            "r": rank, "alpha": alpha, "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern,
            "rank_dropout": 0.0, "module_dropout": 0.0, "use_effective_conv2d": False, "init_weights": True,
        }  # fmt: skip

    def refused(self, site: Site) -> str | None:
        return other_kind(site, "linear", "conv1d", "conv2d")

    def read(self, config: dict[str, Any], path: str) -> Settings:
        asked = [f"{key}={config[key]!r}" for key in ("rank_dropout", "module_dropout") if config.get(key)]
        asked += ["use_effective_conv2d=True"] if config.get("use_effective_conv2d") else []
        if asked:
            raise OptionError(f"loha: this PEFT adapter uses {', '.join(asked)}, which loha does not have")
        return self.settings(
            rank=value_at(config.get("rank_pattern") or {}, path, config["r"]),
            alpha=value_at(config.get("alpha_pattern") or {}, path, config["alpha"]),
        )
