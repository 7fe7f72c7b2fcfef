"""OPCM for models that arrive over time: what is merged so far, kept on disk between one arrival and the next.

The state is the sum S of `rules/opcm.py` and the models' norms. With `rank` set, its size does not depend on how many
models arrived. Arriving one at a time or all at once gives the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from isotune.checkpoint.files import digest, replaced_folder
from isotune.errors import CheckpointError, OptionError
from isotune.linalg.change import Change, scaled, size
from isotune.linalg.low_rank import Factored
from isotune.merging.contract import Aligned
from isotune.merging.rules.opcm import OPCM

FILE = "opcm_state.safetensors"
FORMAT = 1


class OPCMState:
    """What OPCM has merged so far. An arrival that fails leaves it as it was."""

    def __init__(self, rule: OPCM | None = None) -> None:
        self.rule = rule or OPCM()
        self.norms: dict[str, float] = {}
        """The norm of the whole change of every model that arrived, by name, in order."""
        self._merged: dict[str, Change] = {}

    def add(self, sites: Iterable[Aligned]) -> None:
        """Merge the next model, or several in order, given what it did to every weight; walked once.

        Raises OptionError for a model that was merged before, CheckpointError for a weight of another shape.
        """
        merged, norms = dict(self._merged), dict[str, float]()
        for site in sites:
            before = merged.get(site.path)
            for name, change in zip(site.names, site.changes, strict=True):
                self._check(site.path, name, change, before)
                norms[name] = math.hypot(norms.get(name, 0.0), size(change))
            merged[site.path] = self.rule.merge_into(before, site)
        self._merged, self.norms = merged, self.norms | norms

    def _check(self, path: str, name: str, change: Change, before: Change | None) -> None:
        if name in self.norms:
            raise OptionError(f"the model {name!r} was merged before; each model is merged once, under its own name")
        if before is not None and tuple(change.shape) != tuple(before.shape):
            raise CheckpointError(
                f"the change of {path} by {name!r} has shape {tuple(change.shape)}, but the models before it "
                f"have {tuple(before.shape)}; all must be tuned from the same base model"
            )

    @property
    def factor(self) -> float:
        """What the sum is multiplied by, so that its norm is the mean norm of the models."""
        whole = math.hypot(*(size(change) for change in self._merged.values()))
        return self.rule.rescale(list(self.norms.values()), whole) if self.norms else 1.0

    def changes(self) -> Iterator[tuple[str, Change]]:
        """The merged change of every weight, by path."""
        factor = self.factor
        for path, change in self._merged.items():
            yield path, scaled(change, factor)

    def save(self, path: str | Path) -> None:
        """Write the state as a folder, whole or not at all; it takes the place of an older state.

        Raises CheckpointError where that folder cannot be written, or holds something else.
        """
        tensors: dict[str, Tensor] = {}
        for name, change in self._merged.items():
            parts = {"B": change.B, "A": change.A} if isinstance(change, Factored) else {"dense": change}
            # Copies: two tensors of the file must not share memory.
            tensors |= {f"{part}/{name}": tensor.cpu().contiguous().clone() for part, tensor in parts.items()}
        header = {"format": FORMAT, "options": self.rule.model_dump(), "norms": list(self.norms.items())}
        metadata = {"isotune": json.dumps({**header, "digest": digest(tensors)}, sort_keys=True)}
        with replaced_folder(path, replaces=FILE) as folder:
            save_file(tensors, folder / FILE, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path) -> OPCMState:
        """Read a state that `save` wrote. Raises CheckpointError where there is none, or it is damaged."""
        file = Path(path) / FILE
        try:
            with safe_open(file, framework="pt") as opened:
                header = json.loads((opened.metadata() or {})["isotune"])
                tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (no mapping)
            if header["format"] != FORMAT or header["digest"] != digest(tensors):
                raise ValueError("another version wrote it, or it was altered")
            state = cls(OPCM(**header["options"]))
            state.norms = {name: float(norm) for name, norm in header["norms"]}
            for key, tensor in tensors.items():
                part, _, name = key.partition("/")
                if part != "A":
                    state._merged[name] = Factored(tensor, tensors[f"A/{name}"]) if part == "B" else tensor
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, OptionError) as error:
            raise CheckpointError(f"{file} is no state of a merge that can be read: {error}") from None
        return state
