"""Poly in PEFT, whose tasks are numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from isotune.adapters.peft.dialect import Dialect, NotInPEFTError, other_kind
from isotune.adapters.settings import Settings
from isotune.sites import Site


class PolyDialect(Dialect):
    """One set of options for all layers, and a scale of 1 / r. PEFT's layers take inputs of three dimensions."""

    peft_type = "POLY"
    prefix = "poly_"

    def config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        own = self.same(settings)
        if own.router != "learned" or own.alpha != 1:
            raise NotInPEFTError("PEFT's POLY learns its router, and divides by the rank alone")
        return {
            "r": own.rank,
            "n_tasks": len(own.tasks),
            "n_skills": own.skills,
            "n_splits": own.heads,
            "poly_type": "poly",
            "init_weights": True,
        }

    def refused(self, site: Site) -> str | None:
        return other_kind(site, "linear")

    def read(self, config: dict[str, Any], path: str) -> Settings:
        return self.settings(
            rank=config["r"],
            skills=config.get("n_skills", 4),
            heads=config.get("n_splits", 1),
            tasks=tuple(str(task) for task in range(config.get("n_tasks", 1))),
        )
