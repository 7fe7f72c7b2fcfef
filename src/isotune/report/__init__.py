"""Results as one self-contained HTML page: comparisons, runs, adapters and merges, verdict first.

    from isotune.report import build

The names are loaded on first use, so that importing this package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {"build": "page", "collect": "data", "judge": "verdict", "Verdict": "verdict"}

__all__ = ["Verdict", "build", "collect", "judge"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"isotune.report.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
