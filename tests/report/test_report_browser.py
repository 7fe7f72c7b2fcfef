"""The page in a browser: it opens quietly, its controls work, and it looks as it should. One Chromium for all."""

from __future__ import annotations

import base64
import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest

LAYOUTS = Path(__file__).with_name("layouts.json")
SCORES, SPECTRUM = "[data-plot='results/scores-36864']", "[data-plot='spectra/spectrum-1']"

MARKS = ".main-svg :is(path.point, path.js-line, .points path, .hm image)"
DRAWN = f"[...document.querySelectorAll('figure[data-plot]')].map(f => f.querySelectorAll('{MARKS}').length)"


def test_it_opens_fast_and_asks_for_nothing(opened: Any) -> None:
    # A third of a second on an idle machine; what the tests run on may be busy.
    assert opened.page.evaluate("performance.getEntriesByType('navigation')[0].domInteractive") < 5000
    assert len(opened.asked) == 1
    assert opened.asked[0].startswith("file:")


def test_every_figure_is_drawn_once_it_is_seen(opened: Any) -> None:
    assert 0 in opened.page.evaluate(DRAWN)
    for figure in opened.page.locator("figure[data-plot]").all():
        figure.scroll_into_view_if_needed()
        opened.until("f => f.dataset.drawn", figure.element_handle())
    marks = opened.page.evaluate(DRAWN)
    assert len(marks) > 15
    assert min(marks) > 0


def test_tables_are_sorted_by_their_headers_with_the_unknown_last(opened: Any) -> None:
    table = opened.page.locator("#results table").first

    def column(index: int) -> list[str]:
        return table.evaluate("(t, i) => [...t.tBodies[0].rows].map(r => r.cells[i].textContent)", index)

    header = table.get_by_role("columnheader", name="parameters")
    header.get_by_role("button").click()
    assert header.get_attribute("aria-sort") == "descending"
    counts = [int(value.replace(",", "")) for value in column(2)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == 22_713_216
    header.get_by_role("button").click()
    assert header.get_attribute("aria-sort") == "ascending"
    assert column(0)[0] == "frozen base"
    assert "sorted by parameters, ascending" in opened.page.locator("#spoken").text_content()
    for wanted in ("descending", "ascending"):
        rate = table.get_by_role("columnheader", name="learning rate")
        rate.get_by_role("button").click()
        assert rate.get_attribute("aria-sort") == wanted
        assert header.get_attribute("aria-sort") is None
        assert column(0)[-1] == "frozen base"
    rates = [float(value.split()[0]) for value in column(8)[:-1]]
    assert rates == sorted(rates)


def test_the_theme_follows_the_system_and_the_button_changes_it(opened: Any) -> None:
    page, shown = opened.page, "getComputedStyle(document.body).backgroundColor"
    tick = f'getComputedStyle(document.querySelector("{SCORES} .xtick text")).fill'
    opened.draw(SCORES)
    light, text = page.evaluate(shown), page.evaluate(tick)
    page.emulate_media(color_scheme="dark")
    opened.draw(SCORES)
    assert page.evaluate(tick) != text
    dark = page.evaluate(shown)
    assert dark != light
    page.get_by_role("button", name="Light theme").click()
    assert page.evaluate(shown) == light
    opened.draw(SCORES)
    assert page.evaluate(tick) == text
    assert page.evaluate("localStorage.getItem('isotune-theme')") == "light"
    page.get_by_role("button", name="Dark theme").click()
    assert page.evaluate(shown) == dark


def test_everything_works_with_the_keyboard(opened: Any) -> None:
    keys, focused = opened.page.keyboard, "document.activeElement"
    opened.page.locator(".skip").focus()
    keys.press("Enter")
    keys.press("Tab")
    assert opened.page.evaluate(f"{focused}.getAttribute('role')") == "region"
    keys.press("Tab")
    assert opened.page.evaluate(f"{focused}.textContent") == "method"
    keys.press("Enter")
    assert opened.page.evaluate(f"{focused}.parentElement.getAttribute('aria-sort')") == "ascending"
    assert opened.page.evaluate(f"getComputedStyle({focused}).outlineStyle") == "solid"
    opened.draw(SPECTRUM)
    choosers = opened.page.locator("#spectra select")
    assert choosers.first.input_value() == "encoder.layer.1.attention.self.query"
    choosers.first.focus()
    keys.press("ArrowDown")
    assert {chooser.input_value() for chooser in choosers.all()} == {"encoder.layer.1.attention.self.value"}
    keys.press("ArrowUp")
    summary = opened.page.locator("#spectra summary").first
    summary.focus()
    keys.press("Enter")
    details = opened.page.locator("#spectra figure details").first
    assert details.get_attribute("open") is not None
    keys.press("Enter")
    assert details.get_attribute("open") is None


def test_names_roles_and_headings_are_in_order(opened: Any) -> None:
    page = opened.page
    assert page.evaluate("document.documentElement.lang") == "en"
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3')].map(h => +h.tagName[1])")
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    nameless = """[...document.querySelectorAll('button, select, a, [role=img], [role=region], table')].filter(e => !(
        e.textContent.trim() || e.ariaLabel || e.labels?.length
        || document.getElementById(e.getAttribute('aria-labelledby'))?.textContent)).map(e => e.outerHTML)"""
    assert page.locator("main").evaluate(nameless) == []
    twice = "(ids => ids.length - new Set(ids).size)([...document.querySelectorAll('main > section')].map(e => e.id))"
    assert page.evaluate(twice) == 0


@pytest.mark.parametrize("width", [320, 390, 800])
def test_a_narrow_page_does_not_scroll_sideways_and_figures_follow(opened: Any, width: int) -> None:
    opened.see(width)
    figure = opened.draw(SCORES)
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    box = figure.locator(".main-svg").first.bounding_box()
    assert 0 < box["x"] < box["x"] + box["width"] <= width


def test_print_is_light_and_has_every_figure(opened: Any) -> None:
    page = opened.page
    opened.see(theme="dark")
    page.evaluate("addEventListener('beforeprint', () => { window.then = document.documentElement.dataset.theme; })")
    assert len(page.pdf(format="A4")) > 50_000
    assert min(page.evaluate(DRAWN)) > 0
    assert page.evaluate("window.then") == "light"
    opened.until("document.documentElement.dataset.theme === undefined")
    page.emulate_media(media="print")
    assert not page.locator("nav").is_visible()


def test_without_scripts_verdict_and_tables_are_there(chromium: Any, page: Path) -> None:
    context = chromium.new_context(java_script_enabled=False)
    opened = context.new_page()
    opened.goto(page.as_uri())
    assert opened.locator(".headlines li").first.is_visible()
    assert opened.locator("#results table").first.is_visible()
    assert "need JavaScript" in opened.locator("noscript").inner_html()
    assert not opened.locator("#theme").is_visible()
    assert opened.locator("#results table button").count() == 0
    context.close()


# Theme, width, part of the page, and how much may differ, as a part of what sets the picture apart from a blank one.
VIEWS = {
    "verdict": ("light", 1280, "#verdict", 0.9),
    "verdict, narrow": ("light", 390, "#verdict", 0.9),
    "scores": ("dark", 1280, SCORES, 0.6),
    "heat map": ("light", 1280, "[data-plot='changes/heat-0']", 0.6),
    "spectrum": ("light", 1280, SPECTRUM, 0.6),
}


@pytest.mark.parametrize("view", VIEWS)
def test_it_looks_as_it_did(opened: Any, chromium: Any, view: str) -> None:
    """Compared as 24 x 24 greys, so that fonts and versions do not matter, but a figure that is gone does.

    REWRITE_LAYOUTS=1 takes what is seen now as what should be.
    """
    theme, width, selector, most = VIEWS[view]
    opened.see(width, theme)
    place = opened.draw(selector) if "data-plot" in selector else opened.page.locator(selector)
    found = greys(chromium, place.screenshot())
    kept = json.loads(LAYOUTS.read_text()) if LAYOUTS.exists() else {}
    if os.environ.get("REWRITE_LAYOUTS"):
        LAYOUTS.write_text(json.dumps(kept | {view: found}))
        return
    blank = [round(sum(kept[view]) / len(kept[view]))] * len(found)
    assert distance(found, kept[view]) < most * distance(blank, kept[view])


def greys(chromium: Any, screenshot: bytes) -> list[int]:
    """The picture, shrunk to 24 x 24 greys between 0 and 255."""
    other = chromium.new_page()
    found = other.evaluate(
        """async (data) => {
            const picture = new Image();
            picture.src = "data:image/png;base64," + data;
            await picture.decode();
            const canvas = new OffscreenCanvas(24, 24), drawing = canvas.getContext("2d");
            drawing.imageSmoothingQuality = "high";
            drawing.drawImage(picture, 0, 0, 24, 24);
            const dots = drawing.getImageData(0, 0, 24, 24).data;
            const grey = (i) => Math.round((dots[i] + dots[i + 1] + dots[i + 2]) / 3);
            return Array.from({ length: 576 }, (_, i) => grey(4 * i));
        }""",
        base64.b64encode(screenshot).decode(),
    )
    other.close()
    return found


def distance(one: list[int], other: list[int]) -> float:
    """The mean absolute difference."""
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)
