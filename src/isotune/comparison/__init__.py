"""Methods side by side: the same budgets, the same search for a learning rate, the same seeds.

    from isotune.comparison import build_comparison, compare

The names are loaded on first use.
"""

from __future__ import annotations

from isotune.lazy import lazy

_HOMES = {
    "ComparisonRecipe": "recipe",
    "build_comparison": "recipe",
    "Cell": "plan",
    "make_plan": "plan",
    "compare": "run",
    "Row": "results",
    "Store": "store",
    "Summary": "results",
    "summarise": "summary",
}

__all__ = [
    "Cell",
    "ComparisonRecipe",
    "Row",
    "Store",
    "Summary",
    "build_comparison",
    "compare",
    "make_plan",
    "summarise",
]

__getattr__ = lazy(__name__, _HOMES)
