"""Statistics of the weights of one model, in a file beside its adapter, for the rules of merging that need them.

`fisher.safetensors` and `second_moment.safetensors`, in the adapter's folder or the model's: one tensor for each
weight, under the layer's path, or the tensor's name (a final `.weight` left out). A matrix V may be stored by its
sums over rows and columns, `<path>//rows` (out) and `<path>//columns` (in), which stand for

    V ~ (V 1)(1ᵀ V) / (1ᵀ V 1)

as in Adafactor (Shazeer and Stern, ICML 2018, arXiv 1804.04235): exact for rank one, and with V's own sums. The
header names the kind, how it was made, every shape, and the digest of the adapter whose weights these are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from isotune.checkpoint.files import STATISTICS, TENSORS, Statistic, digest, read_adapter, sync
from isotune.errors import CheckpointError, OptionError, nearest

FORMAT = 1
ROWS, COLUMNS = "//rows", "//columns"
HOW_TO_MAKE: dict[str, str] = {
    "fisher": "make it with: isotune statistics RUN --fisher (in Python, isotune.training.collect_fisher)",
    "second_moment": "train with save_second_moments: true in the recipe (--set save_second_moments=true), or let "
    "the empirical Fisher information stand in: isotune.training.collect_fisher(RUN, kind='second_moment')",
}
"""For each kind, what to do where it is missing."""


@dataclass(frozen=True)
class RankOne:
    """A nonnegative matrix, given by its sums over each row (out) and over each column (in)."""

    rows: Tensor
    columns: Tensor

    @classmethod
    def of(cls, V: Tensor) -> RankOne:
        """That of a matrix (out, in)."""
        return cls(V.sum(dim=1), V.sum(dim=0))

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in)."""
        return len(self.rows), len(self.columns)

    def dense(self) -> Tensor:
        """The matrix (out, in); all zeros where the sums are."""
        total = self.rows.sum()
        # Divided first: the product of two sums of squared gradients may be too small for fp32.
        return torch.outer(self.rows, self.columns / total) if total > 0 else torch.zeros(self.shape)


def canonical(path: str) -> str:
    """The key of a weight: a layer's path, whether or not its `.weight` is named."""
    return path.removesuffix(".weight")


def write_statistic(folder: str | Path, kind: Statistic, values: Mapping[str, Tensor | RankOne], **made: Any) -> Path:
    """Write statistics beside the adapter, or the model, in `folder`; a crash leaves the old file or the new one.

    Args:
        folder: The folder of an adapter, to which the file is then bound, or of a model.
        kind: "fisher" or "second_moment".
        values: Nonnegative, by layer's path or tensor's name, in the shape of the weight.
        made: How they were made, such as `examples=256`; kept in the header.

    Raises:
        CheckpointError: No such folder, a statistic that is negative or not finite, or a file that cannot be written.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder} to write statistics beside its weights")
    tensors: dict[str, Tensor] = {}
    for path, value in values.items():
        parts = {"": value} if isinstance(value, Tensor) else {ROWS: value.rows, COLUMNS: value.columns}
        for ending, part in parts.items():
            tensors[canonical(path) + ending] = _checked(part, path, kind).float().cpu().contiguous().clone()
    header = {
        "format": FORMAT,
        "kind": kind,
        "adapter": adapter_digest(folder),
        "shapes": {canonical(path): list(value.shape) for path, value in values.items()},
        "made": made,
    }
    file = folder / STATISTICS[kind]
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        save_file(tensors, temporary, metadata={"isotune": json.dumps(header, sort_keys=True)})
        sync(temporary)
        os.replace(temporary, file)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"could not write {file}: {error}; nothing there was changed") from None
    return file


def _checked(value: Tensor, path: str, kind: str) -> Tensor:
    if not torch.isfinite(value).all() or (value < 0).any():
        raise CheckpointError(f"the {kind} of {path!r} holds values that are negative or not finite")
    return value


def adapter_digest(folder: str | Path) -> str | None:
    """The digest of the adapter's tensors in `folder`: its header's, or computed; None where there is no adapter."""
    file = Path(folder) / TENSORS
    if not file.is_file():
        return None
    header = _metadata(file)
    return str(header["digest"]) if "digest" in header else digest(read_adapter(folder)[1])


def _metadata(file: Path) -> dict[str, Any]:
    """What isotune wrote into the header of a safetensors file; empty where it wrote nothing."""
    try:
        with safe_open(file, framework="pt") as opened:
            found = json.loads((opened.metadata() or {}).get("isotune", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}); it is truncated or no safetensors file") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"the header of {file} is damaged; restore the file from its source")
    return found


class StoredStatistic:
    """A statistic in a folder; its tensors are read one at a time.

    Raises CheckpointError where the folder has none, or one that is damaged, or made of another adapter's weights.
    """

    def __init__(self, folder: str | Path, kind: Statistic) -> None:
        self.folder, self.kind = Path(folder), kind
        self.file = self.folder / STATISTICS[kind]
        if not self.file.is_file():
            raise CheckpointError(f"{self.folder} holds no {self.file.name}; {HOW_TO_MAKE[kind]}")
        header = _metadata(self.file)
        damaged = f"{self.file} is no statistic that isotune wrote, or its header is damaged; {HOW_TO_MAKE[kind]}"
        if header.get("kind") != kind or not isinstance(header.get("shapes"), dict):
            raise CheckpointError(damaged)
        if header.get("format") != FORMAT:
            raise CheckpointError(
                f"{self.file} has format version {header.get('format')}, this isotune reads version {FORMAT}; "
                "upgrade isotune"
            )
        if header.get("adapter") != adapter_digest(self.folder):
            raise CheckpointError(
                f"{self.file} was made of other weights than those in {self.folder}; {HOW_TO_MAKE[kind]}"
            )
        self.shapes = {str(path): tuple(shape) for path, shape in header["shapes"].items()}
        """The shape of each weight that has a statistic, by its key."""
        self.made: dict[str, Any] = dict(header.get("made", {}))
        """How it was made."""

    def __contains__(self, path: str) -> bool:
        return canonical(path) in self.shapes

    def of(self, path: str) -> Tensor:
        """The statistic of a weight, by its layer's path or its own name: dense, in the weight's shape, in fp32.

        Raises CheckpointError where there is none, or it does not keep to its shape, or holds what it must not.
        """
        key = canonical(path)
        if key not in self.shapes:
            raise CheckpointError(f"{self.file} has no {self.kind} of {path!r}.{nearest(key, self.shapes)}")
        try:
            with safe_open(self.file, framework="pt") as opened:
                names = set(opened.keys())
                if key in names:
                    found = _checked(opened.get_tensor(key), path, self.kind)
                else:
                    sums = [_checked(opened.get_tensor(key + part), path, self.kind) for part in (ROWS, COLUMNS)]
                    found = RankOne(*sums).dense()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self.file} cannot be read at {path!r}: {error}") from None
        except CheckpointError as error:
            raise CheckpointError(f"{self.file}: {error}") from None
        if tuple(found.shape) != self.shapes[key]:
            raise CheckpointError(
                f"{self.file} holds a {self.kind} of shape {tuple(found.shape)} for {path!r}, and its header says "
                f"{self.shapes[key]}; the file is damaged"
            )
        return found


def missing(rule: str, kind: str, name: str, path: str) -> OptionError:
    """What a rule raises where a model that changed a weight has no statistic of it."""
    return OptionError(f"{rule} needs the {kind} of {path!r}, and {name!r} has none; {HOW_TO_MAKE[kind]}")
