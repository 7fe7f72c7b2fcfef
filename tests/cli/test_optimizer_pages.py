"""`isotune optimizers`: what there is, explained from the code, and the page that is made of it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path

import pytest

import isotune.optim
from isotune.cli.optimizers import described
from isotune.optim.names import OF_LOOPS, OPTIMIZERS

DOCS = Path(__file__).parents[2] / "docs" / "optimizers.md"
Command = Callable[..., int]


def test_the_list_and_an_explanation(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("optimizers", "--json") == 0
    found = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert found.keys() == OPTIMIZERS.keys() | OF_LOOPS.keys()
    assert not found["scion_light"]["in_recipes"]
    assert found["muon"]["in_recipes"]
    assert command("optimizers", "normuon") == 0
    shown = capsys.readouterr().out
    assert "arXiv 2510.05491" in shown
    assert "beta2" in shown
    assert command("optimizers", "adam") == 2
    assert "optimizer 'adam' is unknown" in capsys.readouterr().err


def test_every_argument_is_explained_with_its_own_default() -> None:
    for one in described():
        thing = getattr(isotune.optim, one.public)
        for name, parameter in inspect.signature(thing).parameters.items():
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
                default, meaning = one.arguments[name]
                assert default == ("-" if parameter.default is inspect.Parameter.empty else repr(parameter.default))
                assert len(meaning) > 1


def test_the_page_is_what_the_command_writes(command: Command, tmp_path: Path) -> None:
    assert command("optimizers", "--write", tmp_path / "optimizers.md") == 0
    assert DOCS.read_text() == (tmp_path / "optimizers.md").read_text(), (
        "run isotune optimizers --write docs/optimizers.md"
    )
