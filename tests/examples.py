"""The code that pages show, taken out of their fences and run."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from isotune.cli import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
NOT_RUN = "not run"
"""How the title of a block begins that the tests cannot run; the rest of the title says why."""
BRIEFLY = {
    "train": ("--set", "training.max_steps=2", "--set", "data.max_length=32", "--no-report"),
    "merge": ("--no-report",),
    "compare": ("--plan",),
}
"""By command, what is added to it to make an example short: little training, and of a comparison the plan only.

Reports have tests of their own.
"""
LANGUAGES = {"python", "bash", "yaml", "toml", "json", "text"}

_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    """Of its first line of code, from 1."""
    language: str
    title: str
    text: str

    @property
    def where(self) -> str:
        """Page and line, for people."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def is_run(self) -> bool:
        """Whether the tests run it."""
        return self.language in ("python", "bash") and not self.title.startswith(NOT_RUN)

    @property
    def file(self) -> str | None:
        """The name of the file that the block shows; None where it is none."""
        return (
            self.title if self.language in ("yaml", "toml", "json") and re.fullmatch(r"[\w.-]+", self.title) else None
        )


def blocks(page: Path, section: str | None = None) -> list[Block]:
    """The fenced blocks of a page, or of one of its sections of the second level, in their order."""
    text = page.read_text(encoding="utf-8")
    start, end = 0, len(text)
    if section is not None:
        found = re.search(rf"^## {re.escape(section)}$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
        assert found is not None, f"{page} has no section {section!r}"
        start, end = found.span()
    return [
        Block(page, text.count("\n", 0, match.start(2)) + 1, *_info(match[1]), match[2])
        for match in _FENCE.finditer(text, start, end)
    ]


def _info(line: str) -> tuple[str, str]:
    """Language and title of a fence's first line."""
    title = re.search(r'title="([^"]*)"', line)
    return line.split(" ", 1)[0], title[1] if title else ""


def run_page(page: Path, names: dict[str, Any]) -> None:
    """Run a page's blocks one after the other in the working folder, its Python among `names`, and all `BRIEFLY`.

    Blocks of YAML or JSON whose title is a file's name are written there.
    """
    for block in blocks(page):
        if block.file is not None:
            Path(block.file).write_text(block.text, encoding="utf-8")
        elif block.is_run and block.language == "python":
            run_python(block, names)
        elif block.is_run:
            run_commands(block)


def run_python(block: Block, names: dict[str, Any]) -> None:
    """Run a block so that a traceback has the page's name and lines."""
    exec(compile("\n" * (block.line - 1) + block.text, str(block.page), "exec"), names)


def run_commands(block: Block) -> None:
    """Run every line of a block, each a command of isotune's, in this process; `BRIEFLY`."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            assert words[0] == "isotune", f"{block.where}: {words[0]!r} is not run here; say so in the block's title"
            more = () if "--resume" in words else BRIEFLY.get(words[1], ())
            assert not run_isotune(*words[1:], *more), f"{block.where}: {line}"


def load_script(path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script as a module, under its folder's name and its own."""
    name = f"{path.parent.name}_{path.stem}".replace("-", "_")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def run_isotune(*arguments: object) -> int:
    """Run the command line as the shell would; returns its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["isotune", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            app.main()
    return int(stop.value.code or 0)
