"""Which methods there are. A built-in method is one line here; others register the entry point `isotune.methods`."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from isotune.adapters.settings import Settings
from isotune.errors import OptionError, nearest

BUILT_IN = {
    "hra": "isotune.adapters.orthogonal.hra:HRA",
    "lora": "isotune.adapters.low_rank.lora:LoRA",
    "oft": "isotune.adapters.orthogonal.oft:OFT",
    "boft": "isotune.adapters.orthogonal.boft:BOFT",
    "psoft": "isotune.adapters.orthogonal.psoft:PSOFT",
    "soda": "isotune.adapters.orthogonal.soda:SODA",
}


@cache
def _load(name: str) -> type[Settings]:
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        return getattr(import_module(module), attribute)
    (entry,) = entry_points(group="isotune.methods", name=name)
    return entry.load()


def method_names() -> list[str]:
    """The names of all methods, built-in ones first."""
    others = sorted(entry_points(group="isotune.methods").names - BUILT_IN.keys())
    return [*BUILT_IN, *others]


def method_class(name: str) -> type[Settings]:
    """The settings class of a method. Raises OptionError for an unknown name."""
    names = method_names()
    if name not in names:
        raise OptionError(f"unknown method {name!r}.{nearest(name, names)} The methods are: {', '.join(names)}.")
    return _load(name)


def method(name: str, **options: Any) -> Settings:
    """A method's settings by name: `method("hra", rank=8)` is `HRA(rank=8)`."""
    return method_class(name)(**options)
