"""LayerNorm tuning in PEFT, which has no options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from isotune.adapters.peft.dialect import Dialect
from isotune.adapters.settings import Settings


class LNTuningDialect(Dialect):
    """Copies of the norms."""

    peft_type = "LN_TUNING"
    prefix = "ln_tuning_"

    def config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        return {}

    def read(self, config: dict[str, Any], path: str) -> Settings:
        return self.settings()
