"""A comparison on a local Ray of two workers comes to the same results as in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_compare import alike, exact, recipe

from isotune.comparison import compare
from isotune.comparison.results import Units
from isotune.errors import IsotuneError

ray = pytest.importorskip("ray", reason="Ray is not installed")


@pytest.fixture
def _quiet_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """No usage reports, and in each worker as many threads as here: another number adds in another order."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))


# Ray leaves files and sockets to the end of the process.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("_quiet_ray")
def test_a_local_ray_of_two_workers_comes_to_the_same_results(bert: Path, rows: Path, tmp_path: Path) -> None:
    few = {
        "compare__methods": "hra", "compare__full": False, "compare__frozen": False, "compare__cost_steps": 0,
        "compare__trials": 1,
    }  # fmt: skip
    found = compare(recipe(bert, rows, tmp_path / "ray", **few), workers=2, ray="local", progress=False)
    assert found.units == Units(planned=3, done=3, failed=0)
    assert not ray.is_initialized()
    compare(recipe(bert, rows, tmp_path / "one", **few), progress=False)
    assert exact(tmp_path / "ray") == alike(tmp_path / "one")


def test_no_cluster_is_one_message(bert: Path, rows: Path, tmp_path: Path) -> None:
    few = {"compare__methods": "hra", "compare__full": False}
    with pytest.raises(IsotuneError, match="no Ray cluster at"):
        compare(recipe(bert, rows, tmp_path / "c", **few), ray="127.0.0.1:1", progress=False)
