"""What one meets first: help, version, one method explained, clear words on what was typed twice or wrong."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import isotune
from isotune.errors import IsotuneError
from isotune.merging.recipe import build_merge_recipe
from isotune.training.recipe import build_recipe

Command = Callable[..., int]


def test_help_imports_nothing_that_takes_long() -> None:
    code = "import sys; sys.argv = ['isotune', '--help']\nfrom isotune.cli.app import main\n"
    code += "try: main()\nexcept SystemExit: pass\n"
    code += "print([name for name in ('torch', 'transformers', 'numpy', 'pydantic') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_version_is_printed(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--version") == 0
    assert capsys.readouterr().out == f"isotune {isotune.__version__}\n"


def test_words_in_square_brackets_reach_the_reader(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train", "compare", "report"):
        assert command(name, "--help") == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert "with isotune installed" not in shown
        assert name != "train" or "with isotune[report] installed" in shown


def test_one_method_is_explained(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("methods", "hra") == 0
    shown = capsys.readouterr().out
    assert "Householder" in shown
    assert "│ rank    │ 8 " in shown
    assert "lora" not in shown.replace("LoRA", "").split("options of")[1]
    assert command("methods", "hrb") == 2
    assert "Did you mean 'hra'?" in capsys.readouterr().err


def test_an_option_given_twice_is_refused(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("train", "--label", "a", "--label", "b") == 2
    assert "--label was given 2 times and takes one value; give it once" in capsys.readouterr().err


def test_texts_given_twice_are_two(command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.csv").write_text("one,two,label\na,b,x\nc,d,y\n")
    flags = ["--model", "minilm", "--data", tmp_path / "x.csv", "--text", "one", "--text", "tow", "--output", "r"]
    assert command("train", *flags) == 2
    assert "no column 'tow' (data.text). Did you mean 'two'?" in capsys.readouterr().err


def test_the_fields_words_for_tasks_are_ours() -> None:
    for theirs, ours in (("text-classification", "classification"), ("text-generation", "causal-lm")):
        assert build_recipe(flags={"model": "m", "data.train": "x", "output": "o", "task": theirs}).task == ours


def test_a_misspelt_key_is_named_where_others_are_missing(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("modle: minilm\n")
    with pytest.raises(IsotuneError, match=r"unknown key 'modle'. Did you mean 'model'"):
        build_recipe(tmp_path / "r.yaml")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("broken")


KEYS = st.sampled_from(["model", "modle", "data", "train", "method", "name", "rank", "models", "path", "rule",
                        "training", "overrides", "output", "seed", "targets", "weights", "compare", ""])  # fmt: skip
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.floats(allow_nan=True), st.text(max_size=4), KEYS
)
BROKEN = st.dictionaries(KEYS, st.recursive(SCALARS, lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.dictionaries(st.one_of(KEYS, st.integers(0, 2)), inner, max_size=3)
), max_leaves=6), max_size=5)  # fmt: skip


@settings(max_examples=200, deadline=None, derandomize=True)
@given(BROKEN)
def test_no_recipe_however_wrong_ends_in_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, raw: dict[str, Any]
) -> None:
    file = tmp_path_factory.mktemp("broken") / "r.yaml"
    file.write_text(yaml.safe_dump(raw))
    for build in (build_recipe, build_merge_recipe):
        with contextlib.suppress(IsotuneError):
            build(file)
