"""What a merge says of itself: the value that it returns, and `merge.json` in the folder that it wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from isotune.errors import IsotuneError
from isotune.folders import MERGE
from isotune.version import __version__


class MergeRecord(BaseModel):
    """What was made of which models, and how. Each kind of result adds what it alone can tell."""

    model_config = ConfigDict(frozen=True)

    kind: str
    path: Path | None = None
    """The folder that was written; left out of the file, which lies in it."""
    rule: str
    options: dict[str, Any] = {}
    models: dict[str, float] = {}
    """The models' names and their weights."""
    folders: list[str] = []
    """Where each model was read."""
    base: str | None = None
    """The base model, where one was named."""
    seed: int = 0
    notes: list[str] = []
    """What was found that is no error."""
    seconds: float | None = None
    """Of merges that go through in one piece; one that can be resumed writes the same bytes either way."""
    isotune: str | None = __version__
    torch: str | None = torch.__version__

    def text(self) -> str:
        """The contents of `merge.json`."""
        return self.model_dump_json(indent=1, exclude={"path"}) + "\n"

    def write(self, folder: Path) -> None:
        """Leave it in a folder that is being written."""
        (folder / MERGE).write_text(self.text(), encoding="utf-8")


class MergedAdapter(MergeRecord):
    """Adapters that became one adapter."""

    kind: Literal["adapter"] = "adapter"
    ranks: dict[str, int]
    """The rank of the merged adapter at each layer."""
    errors: dict[str, float] = {}
    """`|written - merged| / |merged|` of each layer's change in the Frobenius norm: what the rank cut off."""
    error: float = 0.0
    """The same over all layers."""
    norms: dict[str, float] = {}
    """The Frobenius norm of each layer's merged change; of rules on changes."""
    modules: list[str] = []
    """The modules trained in full that the adapter holds."""


class MergedModel(MergeRecord):
    """Full models that became one model."""

    kind: Literal["model"] = "model"
    tensors: int | None = None
    """How many tensors the model has."""
    changed: int
    """How many of them some model had changed; the others are the base's."""
    parameters: int | None = None
    bytes: int | None = None
    factor: float = 1.0
    """The rule's factor on all merged changes; 1 for rules that have none."""
    vocabulary: str = "error"


class CompressedAdapters(MergeRecord):
    """Adapters in one folder from which each comes back."""

    kind: Literal["compressed"] = "compressed"
    errors: dict[str, float]
    """For each adapter the largest relative error of a layer's change, Frobenius."""
    predicted: dict[str, float] = {}
    """For each adapter the largest error of a layer's factors, as the singular values left out give it."""
    values: int | None = None
    """The numbers stored."""
    separate_values: int | None = None
    """The numbers that the adapters by themselves have."""


class MovedSkill(MergeRecord):
    """What fine-tuning changed in one model, added to another or made into its adapter."""

    kind: Literal["skill"] = "skill"
    before: float | None = None
    """How far the blocks of the source were from the target's, in the Frobenius norm; None by activations."""
    after: float | None = None
    """How far they are in the target's basis."""
    left_out: dict[str, str] = {}
    """Tensors to which nothing was added, each with the reason."""


_ANY: TypeAdapter[MergeRecord] = TypeAdapter(
    Annotated[MergedAdapter | MergedModel | CompressedAdapters | MovedSkill, Field(discriminator="kind")]
)


def read_record(folder: str | Path) -> MergeRecord | None:
    """What made the adapter or model in a folder; None where no merge did. Reads the records of older versions.

    Raises IsotuneError for a file that is damaged.
    """
    file = Path(folder) / MERGE
    if not file.is_file():
        return None
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        return _ANY.validate_python(_brought_up(said) | {"path": file.parent})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise IsotuneError(f"{file} is no record of a merge: {error}; restore it from its source") from None


def _brought_up(said: dict[str, Any]) -> dict[str, Any]:
    """A record of an older version, which named no kind, in today's form."""
    if "kind" in said:
        return said
    found = {"isotune": None, "torch": None} | said | {"kind": "adapter" if "ranks" in said else "model"}
    if isinstance(models := said["models"], list):
        found["models"] = {model["name"]: model["weight"] for model in models}
        found["folders"] = [model["folder"] for model in models]
    return found
