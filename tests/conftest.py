"""Shared by every test: one deterministic hypothesis profile, quiet CPU threads, and the report of exemptions."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from laws.exemptions import EXEMPT

# Triton reads it when a kernel is defined. Where there is no GPU its interpreter runs the kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.register_assert_rewrite("laws.statements", "laws.lifecycle", "laws.placement", "support")

settings.register_profile(
    "isotune",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=8,
    print_blob=False,
    report_multiple_bugs=False,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("isotune")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Every test starts from the same random state and leaves torch's global switches as it found them."""
    torch.manual_seed(0)
    yield
    assert torch.get_default_dtype() == torch.float32


@pytest.fixture(autouse=True, scope="module")
def _settled() -> None:
    """What is imported stays: every run collects garbage, and would look through a million objects of modules."""
    gc.collect()
    gc.freeze()


def pytest_configure() -> None:
    # Tests are many and small: more threads than cores only get in each other's way.
    torch.set_num_threads(int(os.environ.get("ISOTUNE_TEST_THREADS", "1")))
    # What is written for good waits for the disk, thousands of times; no test cuts the power.
    os.fsync = lambda handle: None


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the laws that methods are exempt from, each with its declared reason."""
    skipped = [report.longrepr for report in terminalreporter.getreports("skipped")]
    reasons = [where[2] for where in skipped if isinstance(where, tuple)]
    lines = {reason.partition(EXEMPT)[2] for reason in reasons if EXEMPT in reason}
    if lines:
        terminalreporter.section("exemptions from laws")
        for line in sorted(lines):
            terminalreporter.line(line)
