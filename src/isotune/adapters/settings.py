"""What a user writes, `HRA(rank=8)`: a frozen, checked description of a method, from which adapters are built.

The fields of a settings class carry their bounds and a one-line description each; the command line, recipes and
documentation are generated from them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Protocol, TypeVar

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
    dialect: ClassVar[str] = ""
    """Where its form in PEFT is, `package.module:Class` (a `Dialect`); empty where PEFT does not have it."""
    usual_targets: ClassVar[str] = "attention"
    """The preset that names what it goes on, where nothing else is said."""
    trains_shared: ClassVar[bool] = False
    """Whether what `shared` gives is trained."""
    size_option: ClassVar[str | None] = "rank"
    """The whole-number option that decides how many parameters are trained; None where no option does."""

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
        """Tensors that the adapters on all these sites have in common, by their names in PEFT's files.

        They are frozen or, with `trains_shared`, trained by all of them. They may depend on the settings and the
        sizes of the sites alone: a site's weight may be on the meta device.
        """
        return {}

    def shared_at(self, sites: Mapping[str, Site]) -> dict[str, dict[str, Tensor]]:
        """What the adapter at each path has in common with others: what several have is one and the same tensor.

        By default all have what `shared` gives; a method that groups layers by name or place says here which.
        """
        return dict.fromkeys(sites, self.shared(sites.values()))

    def shared_count(self, sites: Mapping[str, Site]) -> int:
        """Trainable parameters that adapters on all these sites, by path, have in common, each counted once."""
        if not self.trains_shared:
            return 0
        found = {id(tensor): tensor for own in self.shared_at(sites).values() for tensor in own.values()}
        return sum(tensor.numel() for tensor in found.values())

    @property
    def stores_shared(self) -> bool:
        """Whether `shared` is saved with the adapter, once for all; otherwise loading draws it again."""
        return self.trains_shared

    @abstractmethod
    def parameter_count(self, site: Site) -> int:
        """Trainable parameters at a site, of which only the kind and the sizes count."""

    def kept_count(self, site: Site) -> int:
        """Numbers (32 bits each) that a site keeps after training, by which methods are compared; mostly the same."""
        return self.parameter_count(site)


class Scheduled(Protocol):
    """An adapter that keeps its settings, for what it does while it trains."""

    settings: Any


S = TypeVar("S", bound=Scheduled)


def by_schedule(adapters: Iterable[S]) -> list[list[S]]:
    """The adapters in groups of the same options but for the rank: those that one choice is made over."""
    groups: dict[str, list[S]] = {}
    for adapter in adapters:
        groups.setdefault(adapter.settings.model_dump_json(exclude={"rank"}), []).append(adapter)
    return list(groups.values())


def check_rank(rank: int, limit: int, what: str) -> None:
    """Raise OptionError unless `rank` is at most `limit`, the size of `what`."""
    if rank > limit:
        raise OptionError(
            f"rank {rank} is larger than the layer: {what} is {limit}; choose a rank of at most {limit}"
        )
