"""Statistics of a model's weights, such as Fisher information, in a safetensors file beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from isotune.checkpoint.stored_models import Header, StoredModel, read_header
from isotune.errors import CheckpointError
from isotune.merging.models.checks import Inputs, refuse


class StoredStatistics:
    """One model's statistics, by the name of the tensor or the path of its layer, in the tensor's stored shape."""

    def __init__(self, file: str | Path, model: StoredModel) -> None:
        self.file, self.label = Path(file), f"the statistics of {model.label}"
        self.headers: dict[str, Header]
        self.fingerprint: list[Any]
        self.headers, _, self.fingerprint = read_header(self.file, self.label)

    def key(self, name: str) -> str | None:
        """The name in the file of a tensor's statistic, or None where there is none."""
        return next((key for key in (name, name.removesuffix(".weight")) if key in self.headers), None)

    def tensor(self, name: str) -> Tensor | None:
        """The statistic of a tensor, or None. Raises CheckpointError for values that are negative or not finite."""
        key = self.key(name)
        if key is None:
            return None
        with safe_open(self.file, framework="pt") as opened:
            found = opened.get_tensor(key)
        if found.numel() and not (found.min() >= 0 and found.max().isfinite()):
            raise CheckpointError(
                f"{self.label} ({self.file}) hold values in {key!r} that are negative or not finite"
            )
        return found


def read_statistics(files: Sequence[str | Path], inputs: Inputs) -> list[StoredStatistics]:
    """The statistics of each model, by their headers. Raises CheckpointError where they do not fit the model."""
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
            f"{name} {list(statistics.headers[key].shape)}, not {list(model.header(name).shape)}"
            for name, key in sorted(keys.items())
            if statistics.headers[key].shape != model.header(name).shape
        ]
        if other:
            problems.append(f"{statistics.label} ({file}) have other shapes than the model: {'; '.join(other)}")
        elif not keys:
            problems.append(f"{statistics.label} ({file}) are of none of the model's tensors")
    refuse(problems)
    return found
