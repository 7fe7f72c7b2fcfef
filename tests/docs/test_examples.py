"""The code on the pages of the documentation runs, block by block; what cannot run here is listed as skipped."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
from worlds import WORLDS

import isotune
from examples import DOCS, LANGUAGES, NOT_RUN, Block, blocks, run_page
from laws.suite import LAWS, check_law

PAGES = {str(page.relative_to(DOCS)): page for page in sorted(DOCS.rglob("*.md"))}
BLOCKS = [block for page in PAGES.values() for block in blocks(page)]
RUN = [name for name, page in PAGES.items() if any(block.is_run for block in blocks(page))]


@contextmanager
def others_may_warn() -> Iterator[None]:
    """Others' warnings about what a page does with their libraries are no errors here."""
    with warnings.catch_warnings():
        for library in ("peft", "diffusers", "torchao", "trl", "transformers"):
            warnings.filterwarnings("ignore", module=library)
        yield


@pytest.mark.parametrize("name", RUN)
def test_the_code_of_a_page_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # The pages say what is there beforehand; see worlds.py for the files and names that stand for it.
    module = ModuleType("page")  # classes that the page makes have to be found again, to be pickled
    monkeypatch.setitem(sys.modules, "page", module)
    with others_may_warn():
        vars(module).update(WORLDS.get(name, dict)())
        run_page(PAGES[name], vars(module))
    if name == "adding-a-method.md":
        _obeys_the_laws(module.Gain)


def _obeys_the_laws(method: type[isotune.Settings]) -> None:
    slow = {"traces_without_a_break", "compiles_without_a_break"}  # the toy method of tests/laws is put under it
    for law in sorted(LAWS.keys() - method.exempt.keys() - slow):
        check_law(method, "linear", law)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.title.startswith(NOT_RUN)], ids=lambda block: block.where)
def test_a_block_that_is_not_run_says_why(block: Block) -> None:
    assert len(block.title) > len(NOT_RUN) + 3, f"{block.where}: say why it is not run"
    pytest.skip(f"{block.where}: {block.title}")


def test_every_block_has_a_language_that_decides_whether_it_is_run() -> None:
    unknown = [block.where for block in BLOCKS if block.language not in LANGUAGES]
    assert not unknown, f"blocks without one of the languages {', '.join(sorted(LANGUAGES))}: {', '.join(unknown)}"
