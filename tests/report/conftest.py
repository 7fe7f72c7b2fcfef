"""One Chromium for all tests of pages, and pages that are opened in it with every complaint on record."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sweeps import diagnosis, sweep

from isotune.report.data import Diagnosed, collect
from isotune.report.page import render
from isotune.report.verdict import judge

ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


class Opened:
    """A page in the browser, and what it did that it should not."""

    def __init__(self, page: Any, file: Path) -> None:
        self.page = page
        self.complaints: list[str] = []
        self.asked: list[str] = []
        page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("request", lambda request: self.asked.append(request.url))
        page.goto(file.as_uri())

    def until(self, condition: str, of: Any = None) -> None:
        """Wait for a condition: Playwright's own waiting is forbidden by the page's security policy."""
        for _ in range(600):
            if self.page.evaluate(condition, of):
                return
            self.page.wait_for_timeout(50)
        raise AssertionError(f"{condition} did not come true")

    def draw(self, selector: str) -> Any:
        """Scroll to a figure and wait until it is drawn as the window is now; gives its locator."""
        figure = self.page.locator(selector).first
        figure.scroll_into_view_if_needed()
        shape = """f => {
            const system = matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light';
            const theme = document.documentElement.dataset.theme ?? system;
            return f.dataset.drawn === f.querySelector('.plot').clientWidth + ' ' + theme;
        }"""
        self.until(shape, figure.element_handle())
        return figure

    def see(self, width: int = 1280, theme: str = "light") -> None:
        """The top of the page in a window of that width, in a system of that theme."""
        self.page.set_viewport_size({"width": width, "height": 900})
        self.page.emulate_media(media="screen", color_scheme=theme)
        self.page.evaluate("delete document.documentElement.dataset.theme; localStorage.clear(); scrollTo(0, 0)")
        self.page.evaluate("document.activeElement.blur()")


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


@pytest.fixture(scope="session")
def _opened(chromium: Any, page: Path) -> Opened:
    """The report, opened once: unpacking the figures' library takes longer than all tests of what it drew."""
    opened = Opened(chromium.new_page(viewport={"width": 1280, "height": 900}), page)
    opened.page.wait_for_selector("html[data-ready]", timeout=120_000)
    return opened


@pytest.fixture
def opened(_opened: Opened) -> Iterator[Opened]:
    """The report as it is seen first. At the end it may have complained of nothing, and asked for nothing more."""
    _opened.see()
    yield _opened
    assert _opened.complaints == []
    assert len(_opened.asked) == 1


@pytest.fixture(scope="session")
def scicite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison of eight methods at two budgets, 154 units."""
    return sweep(tmp_path_factory.mktemp("sweep") / "scicite")


@pytest.fixture(scope="session")
def page(scicite: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its report, with a full fine-tuning, a LoRA and an HRA diagnosed."""
    collected = collect([scicite])
    collected.diagnoses = [
        Diagnosed("full fine-tuning", "full", diagnosis("full", intruders=True) | {"kind": "checkpoint"}),
        Diagnosed("lora", "lora", diagnosis("lora", intruders=True)),
        Diagnosed("hra", "hra", diagnosis("hra", rotation=True)),
    ]
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(render(collected, judge(collected)), encoding="utf-8")
    return file
