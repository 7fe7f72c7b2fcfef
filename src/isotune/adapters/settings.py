"""What a user writes, `HRA(rank=8)`: a frozen, checked description of a method, from which adapters are built.

The fields of a settings class carry their bounds and a one-line description each; the command line, recipes and
documentation are generated from them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from isotune.adapters.contract import Adapter
from isotune.errors import OptionError
from isotune.options import Options
from isotune.sites import Site


class Settings(Options, ABC):
    """Base of every method's settings. Raises OptionError for an unknown option or a value out of bounds."""

    name: ClassVar[str]
    """The method's name in recipes, on the command line and on disk."""
    kinds: ClassVar[frozenset[str]]
    """The kinds of site it can adapt."""
    learning_rate: ClassVar[float]
    """A rate to start from, for AdamW."""
    formula: ClassVar[str]
    """Trainable parameters at a site with default options, in terms of `rank`, `n_in` and `n_out`."""
    exempt: ClassVar[dict[str, str]] = {}
    """Laws that the method cannot keep, by test name, each with the reason."""
    peft_type: ClassVar[str | None] = None
    """PEFT's name for the method, where PEFT has it."""
    peft_aliases: ClassVar[dict[str, str]] = {}
    """Names that `peft_type` had in older versions of PEFT, each with the prefix of the tensors' names then."""
    size_option: ClassVar[str | None] = "rank"
    """The whole-number option that decides how many parameters are trained; None where no option does."""
    peft_prefix: ClassVar[str] = ""
    """What the names of its tensors start with in PEFT's files; by default the method's name."""
    own_tensors: ClassVar[frozenset[str]] = frozenset()
    """Tensors on disk that PEFT does not know, kept so that isotune restores the adapter bit for bit."""

    @property
    def identity_at_start(self) -> bool:
        """Whether a fresh adapter leaves the layer's output as it was."""
        return True

    @abstractmethod
    def build(self, site: Site, generator: torch.Generator) -> Adapter:
        """A fresh adapter for `site`, in fp32 on the CPU; random numbers come from `generator` alone.

        Raises OptionError where the options do not fit the site's shape.
        """

    def allot(self, sites: Mapping[str, Site]) -> dict[str, Settings]:
        """The settings of each site, by path, for a method that has to see all of them: by default the same."""
        return dict.fromkeys(sites, self)

    def check(self, site: Site) -> None:
        """Raise OptionError where the options do not fit the site."""
        self.shell(site)

    def shell(self, site: Site) -> Adapter:
        """An adapter of the right shapes, whose tensors are about to be loaded; by default a fresh one.

        A method whose start is costly, such as a decomposition of W, gives any values in its place.
        """
        return self.build(site, torch.Generator())

    def shared(self, sites: Iterable[Site]) -> dict[str, Tensor]:
        """Frozen tensors that the adapters on all these sites have in common, by their names in PEFT's files.

        They may depend on the settings and the sizes of the sites alone: a site's weight may be on the meta device.
        """
        return {}

    @property
    def stores_shared(self) -> bool:
        """Whether `shared` is saved with the adapter; otherwise loading draws it again."""
        return False

    @abstractmethod
    def parameter_count(self, site: Site) -> int:
        """Trainable parameters at a site, of which only the kind and the sizes count."""

    @classmethod
    def peft_config(cls, settings: dict[str, Settings]) -> dict[str, Any]:
        """The fields of PEFT's config that describe `settings` (by module path).

        Raises NotInPEFTError where PEFT has no way to say it.
        """
        raise NotInPEFTError(f"PEFT has no method {cls.name!r}")

    @classmethod
    def refused_by_peft(cls, site: Site) -> str | None:
        """Why PEFT's form of the method computes something else on this site; None where it does not."""
        return None

    def differs_in_peft(self, site: Site) -> str | None:
        """Why PEFT, given `peft_config`, would put another adapter on this site; None where it would not."""
        return None

    @classmethod
    def claims_peft_config(cls, config: dict[str, Any]) -> bool:
        """Whether a PEFT config of this type is this method's, where several share the type (LORA does)."""
        return False

    @classmethod
    def from_peft_config(cls, config: dict[str, Any], path: str) -> Settings:
        """The settings of the layer at `path` in a PEFT checkpoint. Raises OptionError for what is not supported."""
        raise OptionError(f"{cls.name!r} cannot be read from a PEFT checkpoint")


class NotInPEFTError(Exception):
    """PEFT cannot express these settings; the message says why."""


def same_settings(settings: Mapping[str, Settings]) -> Any:
    """The settings of all layers (by path), for a method of which PEFT has one set of options for all of them.

    Raises NotInPEFTError where they differ.
    """
    first, *others = settings.values()
    if any(other != first for other in others):
        raise NotInPEFTError(f"PEFT's {first.peft_type} has one set of options for all layers")
    return first


def other_kind(site: Site, *kinds: str) -> str | None:
    """Why PEFT does not adapt the site, where it adapts these kinds only; None for a site of these kinds."""
    return None if site.kind in kinds else f"is of the kind {site.kind}, which PEFT does not adapt with this method"


def check_rank(rank: int, limit: int, what: str) -> None:
    """Raise OptionError unless `rank` is at most `limit`, the size of `what`."""
    if rank > limit:
        raise OptionError(
            f"rank {rank} is larger than the layer: {what} is {limit}; choose a rank of at most {limit}"
        )
