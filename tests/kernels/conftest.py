"""Kernels run on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from isotune.kernels import choice


@pytest.fixture(autouse=True)
def _kernels_on() -> Iterator[None]:
    choice.set_kernels("on")
    yield
    choice.set_kernels(None)
