"""RoAd in PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from isotune.adapters.peft.dialect import Dialect, NotInPEFTError
from isotune.adapters.settings import Settings
from isotune.sites import Site


class RoAdDialect(Dialect):
    """One variant and one size of groups for all layers."""

    peft_type = "ROAD"

    def config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        shapes = {(s.variant, s.group_size) for s in settings.values()}
        if len(shapes) > 1:
            raise NotInPEFTError("PEFT's RoAd has one variant and one group size for all layers")
        variant, group_size = shapes.pop()
        return {"variant": f"road_{variant}", "group_size": group_size, "init_weights": True}

    def refused(self, site: Site) -> str | None:
        return None if site.kind == "linear" else f"is of the kind {site.kind}, which PEFT's RoAd does not adapt"

    def read(self, config: dict[str, Any], path: str) -> Settings:
        return self.settings(variant=int(config["variant"].removeprefix("road_")), group_size=config["group_size"])
