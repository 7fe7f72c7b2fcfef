"""HRA in PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from isotune.adapters.peft.dialect import Dialect, NotInPEFTError
from isotune.adapters.peft.limits import uneven_convolution
from isotune.adapters.settings import Settings
from isotune.sites import Site


class HRADialect(Dialect):
    """Reflections of the input, all layers of one rank."""

    peft_type = "HRA"
    own_tensors = frozenset({"hra_u_trained", "hra_u_anchor"})

    def config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        if any(s.side == "out" for s in settings.values()):
            raise NotInPEFTError("PEFT's HRA rotates the input side only")
        # Anchored reflections are stored as the 2r plain ones that they amount to.
        shapes = {
            (2 * s.rank, False) if s.resolved_start == "anchored" else (s.rank, s.strict) for s in settings.values()
        }
        if len(shapes) > 1:
            raise NotInPEFTError("PEFT's HRA has one rank for all layers")
        rank, strict = shapes.pop()
        return {"r": rank, "apply_GS": strict, "bias": "none", "init_weights": True}

    def refused(self, site: Site) -> str | None:
        if site.kind not in ("linear", "conv2d"):
            return f"is of the kind {site.kind}, which PEFT's HRA does not adapt"
        return uneven_convolution(site)

    def read(self, config: dict[str, Any], path: str) -> Settings:
        # PEFT's start is forgotten: the tensors that follow decide where U is.
        return self.settings(rank=config["r"], strict=config.get("apply_GS", False), start="random")
