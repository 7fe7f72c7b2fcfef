"""What a step costs, on a clock that the test holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from isotune.training import measure
from isotune.training.measure import WARM_UP, StepTimer


def test_tokens_a_second_leave_out_padding_and_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now)
    timer: Any = StepTimer()
    assert timer.tokens_per_second() is None
    for step in range(WARM_UP + 2):
        timer.on_step_begin(None, None, None)
        for _ in range(2):  # gradient accumulation
            timer.count(torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]))
        now += 100.0 if step < WARM_UP else 0.5
        timer.on_step_end(None, None, None)
    timer.on_step_begin(None, None, None)  # a step that does not end
    timer.count(torch.ones(1, 50))
    assert timer.median() == 0.5
    assert timer.tokens_per_second() == 2 * 4 / 0.5
