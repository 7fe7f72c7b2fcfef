"""Two processes on one machine: the same metrics as they gather them, written and printed once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import environment, write_recipe

from isotune.training import evaluate
from isotune.training.progress import lone_process

LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"],
    "accelerate launch": [
        "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "--module",
    ],
}  # fmt: skip
"""On a machine without devices, accelerate starts several processes on the CPU under its flag for several devices."""


def launch(launcher: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command line in two processes."""
    return subprocess.run(
        [sys.executable, "-m", *LAUNCHERS[launcher], "isotune.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("launcher", ["accelerate launch", pytest.param("torchrun", marks=pytest.mark.thorough)])
def test_two_processes_train_and_only_the_first_writes_and_prints(
    tmp_path: Path, bert: Path, rows: Path, launcher: str
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", bert, rows, tmp_path / "run", max_steps=6)
    done = launch(launcher, "train", recipe, "--json")
    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout)
    assert metrics == json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["steps"] == 6
    assert done.stderr.count("trainable parameters") == 1
    assert (tmp_path / "run" / "checkpoint-5" / "rng_state_1.pth").is_file()

    single = evaluate(tmp_path / "run")
    assert single["rows"] == 15
    assert single["accuracy"] == metrics["test_accuracy"]
    assert single["loss"] == pytest.approx(metrics["test_loss"], rel=1e-5)


METHODS = [{"name": "hra", "rank": 4, "penalty": 0.1}, {"name": "lora", "rank": 4}]


def test_a_model_sharded_by_fsdp2_or_replicated_by_ddp_trains_and_is_saved_as_a_whole_one() -> None:
    script = Path(__file__).with_name("sharded.py")
    command = [sys.executable, "-m", *LAUNCHERS["torchrun"][:-1], str(script), *map(json.dumps, METHODS)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(METHODS)
    for found in map(json.loads, lines):
        assert found["moved"] > 1e-3
        assert found["losses"] < 1e-5
        assert found["adapter"] < 1e-5


def test_one_process_where_several_were_asked_for_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lone_process() is None
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert "starts one process, whatever --num_processes says" in (lone_process() or "")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert lone_process() is None
