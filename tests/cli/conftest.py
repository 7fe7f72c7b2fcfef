"""The command line's tests share the training tests' tiny models and data."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import bert, llama, prompts, rows, write_recipe

from isotune.cli import app
from isotune.training import build_recipe, train

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


@pytest.fixture(scope="module")
def finished(bert: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished classification run."""
    folder = tmp_path_factory.mktemp("finished")
    recipe = write_recipe(folder / "recipe.yaml", bert, rows, folder / "run", max_steps=12)
    return train(build_recipe(recipe), progress=False).output
