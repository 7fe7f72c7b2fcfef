"""A run's folder: who owns it, what is in it, and which checkpoint can be trusted after a crash.

- recipe.yaml: the resolved recipe, written first; its first line marks the folder as ours
- checkpoint-N/: adapter (or model), optimizer, scheduler, random states; `complete` is written last
- adapter/: the final adapter, with task.json beside it; with `method: full` model/ in its place
- history.json: losses and validation metrics by step
- metrics.json: written last of all: with it, the run is finished
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from isotune.checkpoint.files import TEMPORARY, sync, write_atomically
from isotune.errors import CheckpointError, IsotuneError
from isotune.folders import ADAPTER, BASELINES, HISTORY, METRICS, MODEL, RANGE_TEST, RECIPE
from isotune.training.recipe import Recipe, build_recipe, with_plain_columns

_MARK = "# A resolved isotune recipe: `isotune evaluate` and `isotune train --resume` read it.\n"
_COMPLETE = "complete"


class RunFolder:
    """Paths and states of one run's folder; nothing is written before `create`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe_file = self.path / RECIPE
        self.metrics_file = self.path / METRICS
        self.history_file = self.path / HISTORY
        self.baselines_file = self.path / BASELINES
        self.adapter = self.path / ADAPTER
        self.model = self.path / MODEL

    def is_run(self) -> bool:
        """Whether the folder holds a recipe that isotune wrote."""
        try:
            with open(self.recipe_file, encoding="utf-8") as file:
                return file.readline() == _MARK
        except (OSError, UnicodeDecodeError):
            return False

    def check(self, resume: bool, overwrite: bool) -> None:
        """Raise IsotuneError where a run could not start, or continue, in this folder; writes nothing."""
        if self.path.exists() and not self.path.is_dir():
            raise IsotuneError(f"output {self.path} is a file, not a folder")
        if resume:
            if not self.is_run():
                raise IsotuneError(f"nothing to resume: {self.path} holds no isotune run")
        elif self.is_run():
            if not overwrite:
                raise IsotuneError(
                    f"output {self.path} already holds a run: continue it with --resume, "
                    "replace it with --overwrite, or choose another output"
                )
        elif self._foreign():
            raise IsotuneError(
                f"output {self.path} exists, is not empty, and holds no isotune run; choose another folder"
            )
        self._check_writable()

    def _foreign(self) -> bool:
        try:
            return self.path.is_dir() and any(not entry.name.startswith(TEMPORARY) for entry in self.path.iterdir())
        except OSError as error:
            raise IsotuneError(f"output {self.path} cannot be read: {error.strerror}") from None

    def _check_writable(self) -> None:
        existing = self.path
        while not existing.exists():
            existing = existing.parent
        try:
            tempfile.TemporaryFile(dir=existing, prefix=TEMPORARY).close()
        except OSError as error:
            raise IsotuneError(f"output {self.path} cannot be written: {error.strerror}") from None

    def create(self, recipe: Recipe) -> None:
        """Make the folder, remove an earlier run's files, and write the recipe."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.metrics_file.unlink(missing_ok=True)
            self.history_file.unlink(missing_ok=True)
            self.baselines_file.unlink(missing_ok=True)
            (self.path / RANGE_TEST).unlink(missing_ok=True)
            for folder in (self.adapter, self.model, self.path / "runs", *self._checkpoints()):
                if folder.is_dir():
                    shutil.rmtree(folder)
        except OSError as error:
            raise IsotuneError(f"output {self.path} cannot be written: {error.strerror}") from None
        write_atomically(self.recipe_file, _MARK + recipe.to_yaml())

    def recipe(self) -> Recipe:
        """The recipe the run was started with."""
        return build_recipe(self.recipe_file)

    def check_same(self, recipe: Recipe) -> None:
        """Raise IsotuneError unless this is the recipe that the run was started with, but for its output."""
        before, now = (_flat(with_plain_columns(r.model_dump(mode="json"))) for r in (self.recipe(), recipe))
        changed = [key for key in {**before, **now} if before.get(key) != now.get(key) and key != "output"]
        if changed:
            listed = "; ".join(f"{key}: {before.get(key)!r} then, {now.get(key)!r} now" for key in changed)
            raise IsotuneError(
                f"the recipe differs from the run's in {self.path} ({listed}); resume with the run's own: "
                f"{resume_command(self.path)}"
            )

    def metrics(self) -> dict[str, Any] | None:
        """The results of a finished run, or None."""
        try:
            return json.loads(self.metrics_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise IsotuneError(f"{self.metrics_file} cannot be read: {error}") from None

    def history(self) -> list[dict[str, float]]:
        """Losses and validation metrics by step; empty where the run wrote none."""
        try:
            found: list[dict[str, float]] = json.loads(self.history_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            raise IsotuneError(f"{self.history_file} cannot be read: {error}") from None
        return found

    def trained(self) -> Path | None:
        """The final adapter's folder, or the final model's; None before there is one."""
        return next((folder for folder in (self.adapter, self.model) if folder.is_dir()), None)

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that was written to its end."""
        complete = [folder for folder in self._checkpoints() if (folder / _COMPLETE).is_file()]
        return max(complete, key=_step, default=None)

    def discard_incomplete(self) -> None:
        """Remove the checkpoints whose writing a crash cut short."""
        for folder in self._checkpoints():
            if not (folder / _COMPLETE).is_file():
                shutil.rmtree(folder, ignore_errors=True)

    def _checkpoints(self) -> list[Path]:
        return [folder for folder in self.path.glob("checkpoint-*") if folder.name[11:].isdecimal()]


def trained_folder(path: str | Path) -> Path:
    """The folder of an adapter, or of a model trained in full, given that or its run's.

    Raises IsotuneError for a run that is not finished.
    """
    run = RunFolder(path)
    if not run.is_run():
        return Path(path)
    found = run.trained()
    if found is None:
        raise IsotuneError(f"the run in {path} is not finished: isotune train {run.recipe_file} --resume")
    return found


def adapter_folder(path: str | Path) -> Path:
    """The adapter's folder, given that or its run's. Raises IsotuneError for a run without a finished adapter."""
    run, found = RunFolder(path), trained_folder(path)
    if run.is_run() and found == run.model:
        raise IsotuneError(
            f"the run in {path} has no adapter: it trained the whole model (method: full), which is in {found}"
        )
    return found


def mark_complete(checkpoint: Path) -> None:
    """Flush a checkpoint's files to the disk, then write the marker that makes it valid."""
    for file in checkpoint.rglob("*"):
        if file.is_file():
            sync(file)
    write_atomically(checkpoint / _COMPLETE, "")
    sync(checkpoint)


def mark_incomplete(checkpoint: Path) -> None:
    """Take the marker away before a checkpoint's files are written again."""
    (checkpoint / _COMPLETE).unlink(missing_ok=True)


def checkpoint_step(checkpoint: Path) -> tuple[int, int]:
    """The optimizer step a checkpoint was taken at, and the run's last step."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        return int(state["global_step"]), int(state["max_steps"])
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{checkpoint}: the trainer's state cannot be read: {error}") from None


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name[11:])


def resume_command(output: str | Path) -> str:
    """The command that continues the run in this folder."""
    return f"isotune train {Path(output) / 'recipe.yaml'} --resume"


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}{key}.") if isinstance(inner, dict) else {f"{prefix}{key}": inner}
    return flat
