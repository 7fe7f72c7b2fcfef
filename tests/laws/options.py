"""Draw a method's options from the fields of its settings class, whatever they are."""

from __future__ import annotations

import math
import types
from typing import Any, Literal, Union, get_args, get_origin

from hypothesis import reject
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from pydantic.fields import FieldInfo

from isotune import Settings
from isotune.errors import OptionError

LARGEST = 5  # of integers without an upper bound: ranks, block sizes; the layers drawn are not much larger


@st.composite
def drawn_settings(draw: DrawFn, method: type[Settings]) -> Settings:
    """Settings with each option at its default or anywhere within its bounds; impossible combinations are dropped."""
    options = {}
    for name, field in method.model_fields.items():
        # More dropout than this silences the few inputs of a drawn layer altogether, now and then.
        values = st.sampled_from([0.0, 0.25, 0.5]) if name == "dropout" else _values(field.annotation, field)
        # Ranks vary always: the default is larger than many a drawn layer.
        if values is not None and (name == "rank" or draw(st.booleans())):
            options[name] = draw(values)
    try:
        return method(**options)
    except OptionError:
        reject()


def _values(annotation: Any, field: FieldInfo) -> SearchStrategy[Any] | None:
    """A strategy for a field, or None for a type that has no generic one (it then keeps its default)."""
    if get_origin(annotation) is Literal:
        return st.sampled_from(get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [st.none() if part is types.NoneType else _values(part, field) for part in get_args(annotation)]
        known = [part for part in parts if part is not None]
        return st.one_of(known) if known else None
    if annotation is bool:
        return st.booleans()
    if annotation is int:
        low, high = _bounds(field)
        low = 1 if math.isinf(low) else math.ceil(low) + (low in _exclusive(field))
        return st.integers(low, low + LARGEST - 1 if math.isinf(high) else min(int(high), low + LARGEST - 1))
    if annotation is float:
        low, high = _bounds(field)
        low = 0.0 if math.isinf(low) else low
        high = low + 2 if math.isinf(high) else high
        # A coarse grid: the laws' tolerances are no place for values such as 1e-300.
        inside = [low + (high - low) * k / 8 for k in range(9)]
        return st.sampled_from([value for value in inside if value not in _exclusive(field)])
    return None


def _bounds(field: FieldInfo) -> tuple[float, float]:
    low = max((float(b) for m in field.metadata for b in _of(m, "gt", "ge")), default=-math.inf)
    high = min((float(b) for m in field.metadata for b in _of(m, "lt", "le")), default=math.inf)
    return low, high


def _exclusive(field: FieldInfo) -> set[float]:
    return {float(b) for m in field.metadata for b in _of(m, "gt", "lt")}


def _of(bound: Any, *names: str) -> list[Any]:
    return [getattr(bound, name) for name in names if getattr(bound, name, None) is not None]
