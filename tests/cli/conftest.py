"""The command line's tests share the training tests' tiny models and data."""

import sys
from collections.abc import Callable

import pytest
from tiny import bert, llama, prompts, rows

from isotune.cli import app

__all__ = ["bert", "llama", "prompts", "rows"]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run the command as the shell would; returns its exit code."""

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["isotune", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            app.main()
        return int(stop.value.code or 0)

    return run
