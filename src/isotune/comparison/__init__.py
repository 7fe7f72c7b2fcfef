"""Methods side by side: the same budgets, the same search for a learning rate, the same seeds.

    from isotune.comparison import build_comparison, compare

The names are loaded on first use, so that importing this package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "ComparisonRecipe": "recipe",
    "build_comparison": "recipe",
    "Cell": "plan",
    "make_plan": "plan",
    "compare": "run",
    "Store": "store",
    "summarise": "summary",
}

__all__ = ["Cell", "ComparisonRecipe", "Store", "build_comparison", "compare", "make_plan", "summarise"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"isotune.comparison.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
