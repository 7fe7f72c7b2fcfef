"""What reversible merging keeps of several adapters, in memory and in a folder; each comes back by its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from isotune.checkpoint.files import replaced_folder
from isotune.checkpoint.paired_files import read_sealed, write_sealed
from isotune.errors import CheckpointError, OptionError, nearest
from isotune.linalg.low_rank import Factored
from isotune.linalg.shared_basis import SharedBasis

NAME = "reversible"
INDEX = f"{NAME}.json"


@dataclass(frozen=True)
class Error:
    """What the compression of one change costs. All relative, in the Frobenius norm; 0 where it is kept as it is."""

    change: float
    """`|B' A' - B A| / |B A|`, measured on the factors that come back."""
    factors: float
    """`|[B' - B, A' - A]| / |[B, A]|`, measured, for the aligned factors."""
    predicted: float
    """The same from the singular values left out: equal to `factors`; for a change of lower rank than the layer's
    largest an upper bound, since it is brought back to its own rank."""


@dataclass(frozen=True)
class Member:
    """One model's change of one layer."""

    rank: int
    """The rank that it comes back with."""
    given: int
    """The number of columns of B as it was given."""
    error: Error


@dataclass(frozen=True)
class ReversibleSite:
    """The changes of one layer by several models."""

    shape: tuple[int, int]
    """(out, in)."""
    members: dict[str, Member]
    """By the model's name, in the order of the coefficients."""
    tensors: dict[str, Tensor]
    """B.basis, B.coefficients, B.mean (and A's), and back.<index> (k, r), which turns to a lower rank; or
    B.<index>, A.<index>."""

    @property
    def basis(self) -> int | None:
        """The number of basis models; None where the factors are kept as they are."""
        return self._shared("B").size if "B.basis" in self.tensors else None

    @property
    def values(self) -> int:
        """How many numbers are stored."""
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def separate_values(self) -> int:
        """How many numbers the adapters as they were given have."""
        return sum(self.shape) * sum(member.given for member in self.members.values())

    def recover(self, name: str) -> Factored:
        """The model's change: exactly, or to the error that its member tells."""
        index = list(self.members).index(name)
        if self.basis is None:
            return Factored(self.tensors[f"B.{index}"], self.tensors[f"A.{index}"])
        found = [self._shared(side).vectors(slice(index, index + 1)).flatten() for side in "BA"]
        B, A = (x.reshape(d, len(x) // d) for x, d in zip(found, self.shape, strict=True))
        if (back := self.tensors.get(f"back.{index}")) is not None:
            B, A = B @ back.mT, A @ back.mT
        return Factored(B, A.mT.contiguous())

    def entry(self) -> dict[str, Any]:
        """All but the tensors, as JSON, and their shapes."""
        return {
            "shape": self.shape,
            "members": {name: (m.rank, m.given, astuple(m.error)) for name, m in self.members.items()},
            "tensors": {key: tuple(tensor.shape) for key, tensor in self.tensors.items()},
        }

    def _shared(self, side: str) -> SharedBasis:
        t = self.tensors
        return SharedBasis(t[f"{side}.basis"], t[f"{side}.coefficients"], t.get(f"{side}.mean"))


class Reversible:
    """Several adapters, compressed, each of which comes back by its name."""

    def __init__(self, names: Sequence[str], sites: Mapping[str, ReversibleSite]) -> None:
        self.names, self.sites = tuple(names), dict(sites)

    def recover(self, name: str) -> dict[str, Factored]:
        """The changes of a model, of exactly the layers that it had. Raises OptionError for an unknown name."""
        self._check(name)
        return {path: site.recover(name) for path, site in self.sites.items() if name in site.members}

    def _check(self, name: str) -> None:
        if name not in self.names:
            raise OptionError(
                f"there is no model {name!r}.{nearest(name, self.names)} The models are: {', '.join(self.names)}."
            )

    @cached_property
    def errors(self) -> dict[str, dict[str, Error]]:
        """What the compression costs, by model and layer."""
        return {
            name: {path: site.members[name].error for path, site in self.sites.items() if name in site.members}
            for name in self.names
        }

    @property
    def error(self) -> float:
        """The largest relative error of a change."""
        return max((error.change for of in self.errors.values() for error in of.values()), default=0.0)

    @property
    def values(self) -> int:
        """How many numbers are stored."""
        return sum(site.values for site in self.sites.values())

    @property
    def separate_values(self) -> int:
        """How many numbers the adapters as they were given have."""
        return sum(site.separate_values for site in self.sites.values())

    def save(self, folder: str | Path) -> Path:
        """Write to a folder, all or nothing: absent, empty, or one that holds an older compression.

        Raises CheckpointError where it cannot be written.
        """
        with replaced_folder(folder, INDEX) as new:
            self.write(new)
        return Path(folder)

    def write(self, folder: Path) -> None:
        """Write the two files into a folder that exists."""
        tensors = {f"{path}.{key}": t for path, site in self.sites.items() for key, t in site.tensors.items()}
        sites = {path: site.entry() for path, site in self.sites.items()}
        write_sealed(folder, NAME, {"names": self.names, "sites": sites}, tensors)

    @classmethod
    def load(cls, folder: str | Path) -> Reversible:
        """Read what `save` wrote.

        Raises CheckpointError for a folder that is no such folder, is incomplete, altered, or of another format.
        """
        index, tensors = read_sealed(Path(folder), NAME, _shapes)
        try:
            sites = {path: _site(path, entry, tensors) for path, entry in index["sites"].items()}
            if unknown := {name for site in sites.values() for name in site.members} - set(index["names"]):
                raise ValueError(f"unknown models {', '.join(sorted(unknown))}")
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"{Path(folder) / INDEX} does not make sense: {error!r}") from None
        return cls(index["names"], sites)


def _site(path: str, entry: dict[str, Any], tensors: Mapping[str, Tensor]) -> ReversibleSite:
    """A layer from its entry. Raises KeyError, TypeError, ValueError or RuntimeError where the two do not fit."""
    members = {name: Member(rank, given, Error(*error)) for name, (rank, given, error) in entry["members"].items()}
    m, n = entry["shape"]
    site = ReversibleSite((m, n), members, {key: tensors[f"{path}.{key}"] for key in entry["tensors"]})
    shadow = replace(site, tensors={key: tensor.to("meta") for key, tensor in site.tensors.items()})
    for name, member in members.items():
        change = shadow.recover(name)
        if (change.shape, change.rank) != (site.shape, member.rank):
            raise ValueError(f"{path!r} of {name!r} has another shape than it should")
    return site


def _shapes(index: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes that the tensors of a file must have, given its index."""
    return {
        f"{path}.{key}": tuple(shape)
        for path, entry in index["sites"].items()
        for key, shape in entry["tensors"].items()
    }
