"""A merge that is being written, in a folder beside its output: what of it is done, and whether it can go on.

`.<output>.merging/` holds `plan.json` (what is merged, and how), `done.json` (what is finished, with digests),
`model/` (the output to be) and `changes/` (merged changes that await the factor on all of them). At the end `model/`
is renamed to the output, and the rest removed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from isotune.checkpoint.files import sync, write_atomically
from isotune.checkpoint.streaming import check_digest
from isotune.errors import CheckpointError
from isotune.locks import lock
from isotune.merging.run import Norms


class MergedTensor(NamedTuple):
    """A tensor that some model changed."""

    same: str | None
    """The model whose own change the merged one is, bit for bit; None where it is no model's."""
    file: str | None = None
    """Where the merged change lies, until it is applied."""
    digest: str | None = None


@dataclass
class Done:
    """What of a merge is finished."""

    shards: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each finished file of the output."""
    tensors: dict[str, MergedTensor | None] = field(default_factory=dict)
    """MergedTensor tensors; None for those that no model changed."""
    norms: Norms = field(default_factory=Norms)


class Unfinished:
    """The folder of a merge that is being written."""

    def __init__(self, output: Path) -> None:
        output = output.absolute()
        self.output = output
        self.folder = output.parent / f".{output.name}.merging"
        self.model, self.changes = self.folder / "model", self.folder / "changes"
        self.done = Done()

    @property
    def written(self) -> int:
        """Bytes that lie there already."""
        return sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())

    @contextmanager
    def opened(self, plan: dict[str, Any], resume: bool) -> Iterator[None]:
        """Make the folder, or go on with it; on success put the model in place, otherwise keep what is finished.

        Raises CheckpointError where there is an interrupted merge and `resume` is false or its plan another, where
        another process writes the same output, or where the files cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.folder / "lock", "w") as opened:
                try:
                    lock(opened)
                except BlockingIOError:
                    raise CheckpointError(f"another process is merging into {self.output}; wait for it") from None
                self._prepare(plan, resume)
                try:
                    yield
                    for file in self.model.iterdir():
                        sync(file)
                    sync(self.model)
                    self.model.rename(self.output)  # an empty folder gives way
                    sync(self.output.parent)
                    (self.folder / "done.json").unlink()
                finally:
                    if not (self.folder / "done.json").exists():
                        shutil.rmtree(self.folder, ignore_errors=True)
        except OSError as error:
            raise CheckpointError(
                f"could not write {self.output}: {error}; what is finished is kept in {self.folder} for resume=True "
                "(--resume)"
            ) from None

    def record(self) -> None:
        """Write down what is done; files of which it tells must be on the disk."""
        write_atomically(self.folder / "done.json", json.dumps(asdict(self.done), indent=1) + "\n")

    def _prepare(self, plan: dict[str, Any], resume: bool) -> None:
        plan = json.loads(json.dumps(plan))
        old = _read(self.folder / "plan.json")
        done = _done(_read(self.folder / "done.json")) if old is not None else None
        if done is not None:
            if not resume:
                raise CheckpointError(
                    f"{self.folder} holds an interrupted merge into {self.output}; continue it with resume=True "
                    "(--resume), or remove that folder"
                )
            if old != plan:
                keys = sorted(key for key in plan | old if plan.get(key) != old.get(key))
                raise CheckpointError(
                    f"the interrupted merge in {self.folder} was started with other {', '.join(keys)}; give the same "
                    "again, or remove that folder to start anew"
                )
            for file, digest in done.shards.items():
                check_digest(self.model / file, digest)
            for merged in done.tensors.values():
                if merged is not None and merged.file is not None and merged.digest is not None:
                    check_digest(self.changes / merged.file, merged.digest)
            self.done = done
        else:
            shutil.rmtree(self.model, ignore_errors=True)
            shutil.rmtree(self.changes, ignore_errors=True)
            write_atomically(self.folder / "plan.json", json.dumps(plan, indent=1) + "\n")
        self.model.mkdir(exist_ok=True)
        self.changes.mkdir(exist_ok=True)


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}; remove {file.parent} and merge again") from None


def _done(read: Any) -> Done | None:
    if read is None:
        return None
    tensors = {name: None if found is None else MergedTensor(*found) for name, found in read["tensors"].items()}
    return Done(read["shards"], tensors, Norms(**read["norms"]))
