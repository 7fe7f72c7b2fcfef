"""Adapter folders as the input of merging: their changes, aligned layer by layer, read as they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from isotune.adapters.contract import Adapter, LowRank
from isotune.adapters.settings import Settings
from isotune.checkpoint.base import StoredBase
from isotune.checkpoint.files import Statistic
from isotune.checkpoint.parts import StoredParts, changes_bias
from isotune.checkpoint.stored import StoredAdapter
from isotune.errors import CheckpointError
from isotune.linalg.change import Change
from isotune.linalg.low_rank import Factored
from isotune.linalg.precision import at_least_fp32
from isotune.merging.contract import Aligned
from isotune.sites import Site
from isotune.statistics.stored import StoredStatistic


@dataclass(frozen=True)
class Model:
    """One adapter to merge."""

    name: str
    weight: float
    stored: StoredAdapter
    parts: StoredParts

    @property
    def paths(self) -> list[str]:
        """The layers that it adapts."""
        return list(self.stored.settings)

    @cached_property
    def dtype(self) -> torch.dtype | None:
        """The dtype that its layers' tensors are stored in (of the first, where they differ)."""
        return next((t.dtype for state in self.stored.state.values() for t in state.values()), None)

    def adapter(self, path: str) -> tuple[Site, Settings, Adapter]:
        """The layer at `path`, and what adapts it."""
        site, (adapter,) = self.parts.at(path)
        return site, self.stored.settings[path], adapter

    def needs_base(self, path: str) -> bool:
        """Whether the change at `path` depends on the weight of the base, as a rotation's does."""
        _, _, adapter = self.adapter(path)
        return not (isinstance(adapter, LowRank) and type(adapter).factors is LowRank.factors)

    @torch.no_grad()
    def change(self, path: str) -> Change:
        """The exact change of the weight at `path`, (out, in) in fp32 or better: factored where the method allows.

        Raises CheckpointError for a method that also changes the layer's bias.
        """
        site, _, adapter = self.adapter(path)
        if changes_bias(adapter, site):
            raise CheckpointError(
                f"{self.stored.path}: {adapter.method} also changes the bias of {path!r}, which an adapter of merged "
                "weights has no place for; export it with --to merged, and merge full checkpoints"
            )
        W = at_least_fp32(site.weight)
        pair = adapter.factors(W)
        if pair is not None:
            return Factored(*map(at_least_fp32, pair))
        return adapter.weight(W) - W


@dataclass(frozen=True)
class AdapterInputs:
    """Several adapters, whose layers are walked in the order of the first adapter that has them."""

    models: Sequence[Model]
    base: StoredBase | None
    seed: int = 0
    statistic: Statistic | None = None

    @cached_property
    def paths(self) -> list[str]:
        """Every layer that an adapter is on."""
        return list(dict.fromkeys(path for model in self.models for path in model.paths))

    def owners(self, path: str) -> list[Model]:
        """The adapters that adapt the layer."""
        return [model for model in self.models if path in model.stored.settings]

    def site(self, path: str) -> Site:
        """The layer, of which only the shape is known where there is no base."""
        return self.owners(path)[0].adapter(path)[0]

    def ranks(self, path: str) -> list[int]:
        """The rank of each model's change at `path`; 0 for those that leave the layer alone."""
        return [
            change.rank if isinstance(change, Factored) else min(change.shape)
            for change in self.aligned(path).changes
        ]

    def aligned(self, path: str) -> Aligned:
        """What the models do to the layer."""
        site = self.site(path)
        dtype = torch.float32
        changes: list[Change] = []
        for model in self.models:
            if path in model.stored.settings:
                changes.append(model.change(path))
            else:
                B, A = torch.zeros(site.out_features, 0, dtype=dtype), torch.zeros(0, site.in_features, dtype=dtype)
                changes.append(Factored(B, A))
        names, weights = zip(*((model.name, model.weight) for model in self.models), strict=True)
        return Aligned(path, names, tuple(changes), weights, True, self._statistics(path), self.seed)

    def __iter__(self) -> Iterator[Aligned]:
        return map(self.aligned, self.paths)

    @cached_property
    def _stored_statistics(self) -> list[StoredStatistic]:
        assert self.statistic is not None
        return [StoredStatistic(model.stored.path, self.statistic) for model in self.models]

    def _statistics(self, path: str) -> tuple[Tensor | None, ...]:
        if self.statistic is None:
            return ()
        return tuple(found.of(path) if path in found else None for found in self._stored_statistics)
