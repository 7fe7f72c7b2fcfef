"""One Chromium for all tests of pages, and pages that are opened in it with every complaint on record."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sweeps import diagnosis, sweep

from isotune.report.data import Diagnosis, collect
from isotune.report.page import render
from isotune.report.verdict import judge

ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


class Opened:
    """A page in the browser, and what it did that it should not."""

    def __init__(self, page: Any, file: Path) -> None:
        self.page, self.complaints = page, []
        self.asked: list[str] = []
        page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.asked.append(request.url))
        page.goto(file.as_uri())
        page.wait_for_selector("html[data-ready]", timeout=60_000)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """The browser. CI has one; where there is none, these tests are skipped."""
    program = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium on this machine: apt-get install chromium, or set CHROMIUM")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Any) -> Iterator[Callable[..., Opened]]:
    """Open a file in a fresh context; at the end nothing may have been asked for or complained about."""
    contexts, visited = [], []

    def go(file: Path, width: int = 1280, theme: str = "light", **options: Any) -> Opened:
        context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=theme, **options)
        contexts.append(context)
        visited.append(Opened(context.new_page(), file))
        return visited[-1]

    yield go
    for context in contexts:
        context.close()
    for opened in visited:
        assert opened.complaints == []
        assert [url for url in opened.asked if not url.startswith("file:")] == []
        assert len(opened.asked) == 1


@pytest.fixture(scope="session")
def scicite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of eight methods at two budgets, 154 units."""
    return sweep(tmp_path_factory.mktemp("sweep") / "scicite")


@pytest.fixture(scope="session")
def page(scicite: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its report, with a full fine-tuning, a LoRA and an HRA diagnosed."""
    collected = collect([scicite])
    collected.diagnoses = [
        Diagnosis("full fine-tuning", "full", diagnosis("full", intruders=True) | {"kind": "checkpoint"}),
        Diagnosis("lora", "lora", diagnosis("lora", intruders=True)),
        Diagnosis("hra", "hra", diagnosis("hra", rotation=True)),
    ]
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(render(collected, judge(collected)), encoding="utf-8")
    return file
