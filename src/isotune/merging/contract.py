"""What a rule of merging is: it takes the changes that several models made to one weight, and gives one change.

It sees one site at a time, so that a whole model never has to be in memory; what it has to know of all sites first
(norms, quantiles) it gathers in `survey`.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from isotune.adapters.contract import Adapter
from isotune.adapters.settings import Settings
from isotune.checkpoint.files import Statistic
from isotune.linalg.change import Change, dense
from isotune.linalg.low_rank import Factored
from isotune.merging.record import MergeRecord
from isotune.options import Options
from isotune.sites import Site


@dataclass(frozen=True)
class Aligned:
    """What several models did to the same weight, in the order in which the models were given."""

    path: str
    """The layer's path, or the tensor's name."""
    names: tuple[str, ...]
    """The models' names, all different; whatever is drawn for a model depends on its name, not on its place."""
    changes: tuple[Change, ...]
    """One for each model. A model that left the weight alone has a change of zero (factored: of rank 0)."""
    weights: tuple[float, ...]
    """One for each model, as the user gave them; 1 each by default."""
    matrix: bool = True
    """Whether it is the weight of a layer that multiplies: what the spectral rules apply to."""
    statistics: tuple[Tensor | None, ...] = ()
    """Where the rule needs one: each model's statistic of the weight, nonnegative, in the weight's shape."""
    seed: int = 0

    def generator(self, name: str) -> torch.Generator:
        """A fresh generator on the CPU for a model at this site: the same whatever the order and the device."""
        # torch's CPU generator uses the low 32 bits of a seed only.
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {self.path} {name}".encode()))

    @property
    def factored(self) -> bool:
        """Whether all changes are factored."""
        return all(isinstance(change, Factored) for change in self.changes)

    def dense(self) -> list[Tensor]:
        """The changes as dense tensors, all of the weight's shape."""
        return [dense(change) for change in self.changes]


class AnyRule(Options, ABC):
    """What every rule of merging says of itself. Its fields are its options. See `Rule`, `RotationRule`, `Job`."""

    takes: ClassVar[Literal["changes", "rotations", "adapters", "models"]]
    """What it is given: the changes of one weight, orthogonal adapters on it, whole adapters, or whole models."""
    symmetric: ClassVar[bool] = True
    """Whether the order of the models does not matter."""
    models: ClassVar[tuple[int, int | None]] = (1, None)
    """The least and the largest number of models that it takes."""
    random: ClassVar[bool] = False
    """Whether it draws, so that `seed` matters."""
    exempt: ClassVar[dict[str, str]] = {}
    """Laws that the rule cannot keep, by test name, each with the reason."""
    neutral: ClassVar[dict[str, Any]] = {}
    """Options with which it trims and draws nothing, so that one model with weight 1 stays what it is."""


class Rule(AnyRule):
    """A rule on changes. `merge` must be written; the rest has defaults.

    Laws (tests/merging/test_every_rule.py): one model with weight 1 gives its own change; factored and dense inputs
    give the same; a symmetric rule gives the same for any order of the models; the change has no more rank than the
    changes together, unless `exact_rank` is False; the number of threads does not matter; a rule that draws repeats
    with the same seed; inputs stay as they were.
    """

    takes = "changes"
    exact_rank: ClassVar[bool] = True
    """Whether factored changes give a factored change; False for rules on single entries of the weight."""
    linear: ClassVar[bool] = False
    """Whether it gives `Σ w_i ΔW_i` for weights that sum to 1, which then need no base model."""
    equal_ranks: ClassVar[bool] = False
    """Whether it can only take changes of the same rank at a site."""
    statistic: ClassVar[Statistic | None] = None
    """Which statistic of each weight it needs from each model."""

    def survey(self, sites: Iterable[Aligned]) -> Any:
        """What the rule has to know of all sites before it merges the first; by default nothing (None).

        `sites` is read from disk as it is walked: walk it once, and keep nothing of the size of a weight.
        """
        return None

    @abstractmethod
    def merge(self, site: Aligned, surveyed: Any) -> Change:
        """The merged change of one weight, given what `survey` returned. Must not alter the inputs."""

    def rescale(self, norms: Sequence[float], merged: float) -> float:
        """A factor on all merged changes, given the Frobenius norms of the models' and of the merged changes.

        The norms are over the whole model. By default 1.
        """
        return 1.0


class RotationRule(AnyRule):
    """A rule on orthogonal adapters, which merges rotations as rotations."""

    takes = "rotations"
    absent: ClassVar[Literal["skip", "identity"]] = "skip"
    """What a model counts as at a layer that it left alone: as nothing, or as a rotation by nothing."""

    @abstractmethod
    def merge(
        self, site: Site, parts: Sequence[tuple[Settings, Adapter]], weights: Sequence[float]
    ) -> tuple[Settings, Adapter]:
        """The merged adapter of one site. Of the site only the shape is known, not the weight.

        Raises OptionError for adapters that are no rotations, or no two of a kind that can be merged.
        """


class Job(AnyRule):
    """What takes whole adapters or models and makes something else of them than one adapter or one merged model."""

    unweighted: ClassVar[str]
    """What is said to a user who gives weights: why they have no meaning here."""
    needs_base: ClassVar[str | None] = None
    """Where it needs a base: what the base is, for a user who names none."""

    @abstractmethod
    def run(
        self, models: Sequence[Path], output: Path, names: Sequence[str] | None, base: str | None, progress: bool
    ) -> MergeRecord:
        """Do it, write the folder `output` with its record in it, and return the record.

        Args:
            models: The folders of adapters or of full models, as `takes` says.
            output: The folder to write.
            names: The models' names; by default their folders'.
            base: The base model's folder or hub id, where one is named.
            progress: Whether to show anything on standard error.

        Raises:
            IsotuneError: Models or options that cannot be used; nothing is written then.
        """
