"""PEFT's patterns: an option that one value decides for most layers, and a table by path for the others."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, TypeVar

T = TypeVar("T")


def common_and_rest(values: dict[str, T]) -> tuple[T, dict[str, T]]:
    """The commonest of the values by path, and those that differ from it."""
    common = Counter(values.values()).most_common(1)[0][0]
    return common, {path: value for path, value in values.items() if value != common}


def value_at(pattern: dict[str, Any], path: str, default: Any) -> Any:
    """PEFT's rule: the first key that, as a regular expression, matches the path or a suffix of it after a dot."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", path):
            return value
    return default
