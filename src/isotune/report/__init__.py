"""Results as one self-contained HTML page: comparisons, runs, adapters and merges, verdict first.

    from isotune.report import build

The names are loaded on first use.
"""

from __future__ import annotations

from isotune.lazy import lazy

_HOMES = {"build": "page", "collect": "data", "judge": "verdict", "Verdict": "verdict"}

__all__ = ["Verdict", "build", "collect", "judge"]

__getattr__ = lazy(__name__, _HOMES)
