"""Results files, read back: for every section a full run is preferred to a quick one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Result = dict[str, Any]
Results = dict[str, Result]
"""By section, of one device."""


def read_results(folder: Path, device: str = "cpu") -> Results:
    """The results of a device ("cpu" or "cuda") by section; a quick one only where there is no other."""
    found: Results = {}
    for file in sorted(folder.glob(f"{device}*.json")):
        result = json.loads(file.read_text())
        section = result["section"]
        if section not in found or found[section]["settings"]["quick"]:
            found[section] = result
    return found


def full(results: Results) -> Results:
    """The sections that were measured in full."""
    return {section: result for section, result in results.items() if not result["settings"]["quick"]}


def rows(results: Results, section: str) -> list[dict[str, Any]]:
    """The rows of a section; none where it was not run."""
    return results[section]["rows"] if section in results else []


def median(row: dict[str, Any], name: str, phase: str = "total") -> float | None:
    """The median of a contender's phase in a row; None where it was left out."""
    figure = row["contenders"].get(name, {}).get(phase)
    return figure["median"] if isinstance(figure, dict) else figure


def ratio(row: dict[str, Any], name: str, reference: str, phase: str = "total") -> float | None:
    """A contender's median over another's; None where one of the two is missing."""
    above, below = median(row, name, phase), median(row, reference, phase)
    return above / below if above is not None and below else None


def find(results: Results, section: str, **wanted: Any) -> dict[str, Any] | None:
    """The first row of a section whose case has the wanted fields."""
    for row in rows(results, section):
        if all(row["case"].get(key) == value for key, value in wanted.items()):
            return row
    return None
