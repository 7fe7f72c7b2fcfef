"""HiRA in PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from isotune.adapters.peft.dialect import Dialect, other_kind
from isotune.adapters.settings import Settings
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
