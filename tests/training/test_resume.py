"""Runs that are killed, interrupted, or out of disk go on to the same bits, or say what is wrong."""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from forked import start_slowly
from tiny import assert_same_bits, write_recipe

from isotune.errors import CheckpointError, IsotuneError
from isotune.training import build_recipe, train
from isotune.training.folder import RunFolder
from isotune.training.measure import StepTimer


@pytest.fixture(scope="module")
def uninterrupted(bert: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing disturbs, in a process like those of the others."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = write_recipe(folder / "recipe.yaml", bert, rows, folder / "run")
    code, errors = start_slowly("train", recipe).end()
    assert code == 0, errors
    return folder / "run"


def resume(run: Path) -> str:
    """Resume a run in a process of its own; returns what it printed for people."""
    code, errors = start_slowly("train", run / "recipe.yaml", "--resume").end()
    assert code == 0, errors
    return errors


def killed_run(tmp_path: Path, bert: Path, rows: Path, step: int, number: int, delay: float = 0.0) -> Path:
    recipe = write_recipe(tmp_path / "recipe.yaml", bert, rows, tmp_path / "run")
    process = start_slowly("train", recipe)
    process.signal_at_step(step, number, delay)
    assert process.end()[0] == -number
    return tmp_path / "run"


@pytest.mark.parametrize("step", [2, random.Random(7).randint(6, 26)])
def test_a_run_killed_at_any_step_resumes_to_the_same_bits(
    tmp_path: Path, bert: Path, rows: Path, uninterrupted: Path, step: int
) -> None:
    delay = random.Random(step).uniform(0, 0.08)
    run = killed_run(tmp_path, bert, rows, step, signal.SIGKILL, delay)
    errors = resume(run)
    assert ("resuming from checkpoint" in errors) == (step > 5)
    assert_same_bits(run / "adapter", uninterrupted / "adapter")
    one, other = (json.loads((path / "metrics.json").read_text()) for path in (run, uninterrupted))
    for key in ("test_accuracy", "test_loss", "validation_loss", "steps", "epochs"):
        assert one[key] == other[key]
    assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-6)


def test_ctrl_c_saves_a_checkpoint_and_says_how_to_resume(
    tmp_path: Path, bert: Path, rows: Path, uninterrupted: Path
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", bert, rows, tmp_path / "run")
    process = start_slowly("train", recipe)
    process.signal_at_step(12, signal.SIGINT)
    code, errors = process.end()
    run = tmp_path / "run"
    assert code == 130
    assert f"isotune train {run / 'recipe.yaml'} --resume" in errors
    last = RunFolder(run).last_checkpoint()
    assert last is not None
    assert last.name in ("checkpoint-12", "checkpoint-13")
    resume(run)
    assert_same_bits(run / "adapter", uninterrupted / "adapter")


def test_a_checkpoint_cut_short_is_never_resumed_from(tmp_path: Path, uninterrupted: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    folder = RunFolder(run)
    before = folder.last_checkpoint()
    half = run / "checkpoint-9999"
    half.mkdir()
    (half / "trainer_state.json").write_text("{")
    assert folder.last_checkpoint() == before
    folder.discard_incomplete()
    assert not half.exists()
    assert folder.last_checkpoint() == before


def test_a_run_killed_after_its_last_checkpoint_finishes_without_another_step(
    tmp_path: Path, uninterrupted: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    (run / "metrics.json").unlink()
    shutil.rmtree(run / "adapter")
    recipe = (run / "recipe.yaml").read_text().replace(str(uninterrupted), str(run))
    (run / "recipe.yaml").write_text(recipe)
    result = train(build_recipe(run / "recipe.yaml"), resume=True, progress=False)
    assert_same_bits(result.adapter, uninterrupted / "adapter")
    assert result.metrics["steps"] == json.loads((uninterrupted / "metrics.json").read_text())["steps"]
    assert result.metrics["seconds_per_step"] is None


def test_resuming_a_finished_run_returns_its_results(uninterrupted: Path) -> None:
    result = train(build_recipe(uninterrupted / "recipe.yaml"), resume=True, progress=False)
    assert result.metrics == json.loads((uninterrupted / "metrics.json").read_text())


def test_a_recipe_that_differs_from_the_run_is_refused_by_name(uninterrupted: Path) -> None:
    other = build_recipe(uninterrupted / "recipe.yaml", sets=["training.learning_rate=0.5"])
    with pytest.raises(IsotuneError, match=r"training.learning_rate: 0.01 then, 0.5 now"):
        train(other, resume=True, progress=False)


def test_a_full_disk_leaves_the_older_checkpoint_intact(
    tmp_path: Path, bert: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = build_recipe(write_recipe(tmp_path / "recipe.yaml", bert, rows, tmp_path / "run"))
    folder = RunFolder(tmp_path / "run")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fills_up(self: StepTimer, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG001
        if state.global_step == 9:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))

    try:
        with monkeypatch.context() as patch:
            patch.setattr(StepTimer, "on_step_end", fills_up)
            with pytest.raises(CheckpointError, match="step 10 cannot be written"):
                train(recipe, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    last = folder.last_checkpoint()
    assert last is not None
    assert last.name == "checkpoint-5"
    assert train(build_recipe(folder.recipe_file), resume=True, progress=False).metrics["steps"] == 27


def test_nothing_to_resume_from_is_said(tmp_path: Path, bert: Path, rows: Path) -> None:
    recipe = build_recipe(write_recipe(tmp_path / "recipe.yaml", bert, rows, tmp_path / "run"))
    with pytest.raises(IsotuneError, match="nothing to resume"):
        train(recipe, resume=True, progress=False)
    assert not (tmp_path / "run").exists()
