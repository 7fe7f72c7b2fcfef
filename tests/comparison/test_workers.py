"""What a worker process gets."""

from __future__ import annotations

import pytest

from isotune.comparison.workers import own_device


@pytest.mark.parametrize(("visible", "expected"), [(None, ["0", "1", "0"]), ("5,7", ["5", "7", "5"])])
def test_workers_take_turns_on_the_visible_gpus(visible: str | None, expected: list[str]) -> None:
    assert [own_device(index, 2, visible) for index in range(3)] == expected
