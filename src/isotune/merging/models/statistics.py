"""Statistics of a model's weights, such as Fisher information, in a safetensors file beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from isotune.checkpoint.files import STATISTICS, Statistic
from isotune.checkpoint.stored_models import Header, StoredModel, read_header
from isotune.errors import CheckpointError
from isotune.merging.models.checks import ModelInputs, refuse
from isotune.statistics.stored import COLUMNS, HOW_TO_MAKE, ROWS, RankOne, canonical


class StoredStatistics:
    """One model's statistics, by the name of the tensor or the path of its layer, in the tensor's stored shape.

    A matrix may be given by its sums over rows and columns, as in the files that isotune writes (`RankOne`).
    """

    def __init__(self, file: str | Path, model: StoredModel) -> None:
        self.file, self.label = Path(file), f"the statistics of {model.label}"
        self.headers: dict[str, Header]
        self.fingerprint: list[Any]
        self.headers, _, self.fingerprint = read_header(self.file, self.label)

    def key(self, name: str) -> str | None:
        """The name in the file of a tensor's statistic, or None where there is none."""
        spellings = (f"{path}{end}" for path in (name, canonical(name)) for end in ("", ROWS))
        found = next((key for key in spellings if key in self.headers), None)
        if found is not None and found.endswith(ROWS) and found.removesuffix(ROWS) + COLUMNS not in self.headers:
            raise CheckpointError(f"{self.label} ({self.file}) are damaged: {found!r} is without its columns")
        return found

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of the statistic that has this name in the file."""
        if not key.endswith(ROWS):
            return self.headers[key].shape
        return self.headers[key].shape + self.headers[f"{key.removesuffix(ROWS)}{COLUMNS}"].shape

    def tensor(self, name: str) -> Tensor | None:
        """The statistic of a tensor, in its shape, or None.

        Raises CheckpointError for values that are negative or not finite.
        """
        key = self.key(name)
        if key is None:
            return None
        with safe_open(self.file, framework="pt") as opened:
            found = opened.get_tensor(key)
            if key.endswith(ROWS):
                found = RankOne(found, opened.get_tensor(f"{key.removesuffix(ROWS)}{COLUMNS}")).dense()
        if found.numel() and not (found.min() >= 0 and found.max().isfinite()):
            raise CheckpointError(
                f"{self.label} ({self.file}) hold values in {key!r} that are negative or not finite"
            )
        return found


def read_statistics(
    kind: Statistic, files: Sequence[str | Path] | None, inputs: ModelInputs
) -> list[StoredStatistics]:
    """The statistics of each model, by their headers: those in the files or, without, in the models' folders.

    Raises CheckpointError where there are none, or they do not fit the model.
    """
    if files is None:
        name = STATISTICS[kind]
        without = [model for model in inputs.models if not (model.folder / name).is_file()]
        refuse([f"{model.label} ({model.folder}) holds no {name}; {HOW_TO_MAKE[kind]}" for model in without])
        files = [model.folder / name for model in inputs.models]
    found, problems = [], []
    for file, model in zip(files, inputs.models, strict=True):
        try:
            statistics = StoredStatistics(file, model)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        found.append(statistics)
        keys = {name: key for name in inputs.merged if (key := statistics.key(name))}
        other = [
            f"{name} {list(statistics.shape(key))}, not {list(model.header(name).shape)}"
            for name, key in sorted(keys.items())
            if statistics.shape(key) != model.header(name).shape
        ]
        if other:
            problems.append(f"{statistics.label} ({file}) have other shapes than the model: {'; '.join(other)}")
        elif not keys:
            problems.append(f"{statistics.label} ({file}) are of none of the model's tensors")
    refuse(problems)
    return found
