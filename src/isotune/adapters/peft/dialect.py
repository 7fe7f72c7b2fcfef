"""How PEFT writes a method: its type and config, what it cannot express, and which layers it adapts otherwise.

The names and shapes of an adapter's tensors in files are the adapter's own (`Adapter.peft_state`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, ClassVar

from torch import Tensor

from isotune.adapters.settings import Settings
from isotune.errors import OptionError
from isotune.sites import Site


class NotInPEFTError(Exception):
    """PEFT cannot express these settings; the message says why."""


class Dialect:
    """PEFT's form of a method; this one, of a method that PEFT does not have."""

    peft_type: str | None = None
    """PEFT's name for the method, where PEFT has it."""
    aliases: ClassVar[dict[str, str]] = {}
    """Names that `peft_type` had in older versions of PEFT, each with the prefix of the tensors' names then."""
    prefix: str = ""
    """What the names of its tensors start with; by default the method's name."""
    own_tensors: frozenset[str] = frozenset()
    """Tensors on disk that PEFT does not know, kept so that isotune restores the adapter bit for bit."""
    whole: frozenset[str] = frozenset()
    """PEFT's tensors of the whole model, where it keeps all layers in them; `joined` and `parted` go between the two.
    """

    def __init__(self, method: type[Settings]) -> None:
        self.method = method
        self.prefix = self.prefix or f"{method.name}_"

    def config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of PEFT's config that describe `settings` (by module path).

        Raises NotInPEFTError where PEFT has no way to say it.
        """
        raise NotInPEFTError(f"PEFT has no method {self.method.name!r}")

    def refused(self, site: Site) -> str | None:
        """Why PEFT's form of the method computes something else on this site; None where it does not."""
        return None

    def differs(self, own: Any, site: Site) -> str | None:
        """Why PEFT, given `config`, would put another adapter on this site; None where it would not."""
        return None

    def claims(self, config: dict[str, Any]) -> bool:
        """Whether a PEFT config of this type is this method's, where several share the type (LORA does)."""
        return False

    def read(self, config: dict[str, Any], path: str) -> Settings:
        """The settings of the layer at `path` in a PEFT checkpoint. Raises OptionError for what is not supported."""
        raise OptionError(f"{self.method.name!r} cannot be read from a PEFT checkpoint")

    def joined(self, states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """PEFT's tensors of the whole model, of the adapters' own on its layers in their order; where `whole`."""
        raise NotImplementedError(self.method.name)

    def parted(self, tensors: Mapping[str, Tensor], layers: int) -> list[dict[str, Tensor]]:
        """The adapters' own tensors on each of a model's layers; the inverse of `joined`."""
        raise NotImplementedError(self.method.name)

    def settings(self, **options: Any) -> Settings:
        """The method's settings with these options."""
        return self.method(**options)

    def same(self, settings: Mapping[str, Any]) -> Any:
        """The settings of all layers, for a method of which PEFT has one set of options for all of them.

        Raises NotInPEFTError where they differ.
        """
        first, *others = settings.values()
        if any(other != first for other in others):
            raise NotInPEFTError(f"PEFT's {self.peft_type} has one set of options for all layers")
        return first


@functools.cache
def dialect_of(method: type[Settings]) -> Dialect:
    """The dialect that a method names."""
    if not method.dialect:
        return Dialect(method)
    module, _, name = method.dialect.partition(":")
    found: Dialect = getattr(import_module(module), name)(method)
    return found


def other_kind(site: Site, *kinds: str) -> str | None:
    """Why PEFT does not adapt the site, where it adapts these kinds only; None for a site of these kinds."""
    return None if site.kind in kinds else f"is of the kind {site.kind}, which PEFT does not adapt with this method"
