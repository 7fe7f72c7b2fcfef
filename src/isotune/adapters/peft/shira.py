"""SHiRA in PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from isotune.adapters.peft.dialect import Dialect, other_kind
from isotune.adapters.settings import Settings
from isotune.sites import Site


class SHiRADialect(Dialect):
    """One rank and one seed for all layers; a file's positions count, whatever drew them."""

    peft_type = "SHIRA"

    def config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        own = self.same(settings)
        return {"r": own.rank, "random_seed": own.seed, "mask_type": "random", "init_weights": True}

    def refused(self, site: Site) -> str | None:
        return other_kind(site, "linear")

    def read(self, config: dict[str, Any], path: str) -> Settings:
        return self.settings(rank=config["r"], seed=config.get("random_seed") or 0)
