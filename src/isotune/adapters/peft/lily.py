"""Lily in PEFT, which keeps a copy of what layers share with each of them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import permutations
from typing import Any

from isotune.adapters.peft.dialect import Dialect, NotInPEFTError, other_kind
from isotune.adapters.settings import Settings
from isotune.sites import Site

_MANY = 20
"""From so many target layers on PEFT puts endings of their paths in the place of the paths."""


class LilyDialect(Dialect):
    """Layers that end in the same of `target_modules`, and are of one size, share; p is a mean over all tokens.

    Targets are written as paths, and a stride of one: where they are few PEFT has each layer for itself, and else the
    layers of a name have their B in common. Either way each gets the A and the B that it had.
    """

    peft_type = "LILY"

    def config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        own = self.same(settings)
        if own.routing != "sequence":
            raise NotInPEFTError("PEFT's LILY weighs experts by their mean over tokens (routing='sequence')")
        few = len(settings) < _MANY
        named = {(path if few else path.rpartition(".")[2], own.ending(path)) for path in settings}
        for (name, group), (other, another) in permutations(sorted(named), 2):
            if other.endswith(name) and group != another:
                raise NotInPEFTError(f"PEFT's LILY takes {other!r} for a layer of {name!r}, which has other experts")
        return {"r": own.rank, "stride_A": 1, "num_B": own.experts, "scaling": own.scale, "init_weights": True}

    def refused(self, site: Site) -> str | None:
        return other_kind(site, "linear")

    def read(self, config: dict[str, Any], path: str) -> Settings:
        targets = config["target_modules"]
        return self.settings(
            rank=config["r"],
            stride=config["stride_A"],
            experts=config["num_B"],
            scale=config["scaling"],
            routing="sequence",
            groups=("",) if isinstance(targets, str) else tuple(sorted(targets)),
        )
