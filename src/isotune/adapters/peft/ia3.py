"""IA3 in PEFT."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from isotune.adapters.peft.dialect import Dialect, NotInPEFTError, other_kind
from isotune.adapters.settings import Settings
from isotune.sites import LINEAR, Site


class IA3Dialect(Dialect):
    """A layer scales its input where it is named among the feed-forward modules."""

    peft_type = "IA3"

    def config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        inputs = sorted(path for path, s in settings.items() if s.side == "in")
        config = {"feedforward_modules": inputs, "init_ia3_weights": True}
        if any(_is_feedforward(config, path) != (path in inputs) for path in settings):
            raise NotInPEFTError("PEFT would scale inputs of a layer whose path ends in the path of such a one")
        return config

    def refused(self, site: Site) -> str | None:
        return other_kind(site, *LINEAR, "conv2d")

    def read(self, config: dict[str, Any], path: str) -> Settings:
        return self.settings(side="in" if _is_feedforward(config, path) else "out")


def _is_feedforward(config: dict[str, Any], path: str) -> bool:
    """PEFT's rule: a regular expression for the whole path, or endings of it."""
    modules = config["feedforward_modules"] or []
    return bool(re.fullmatch(modules, path)) if isinstance(modules, str) else path.endswith(tuple(modules))
