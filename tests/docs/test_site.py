"""The documentation as a site: every page is in it, links lead somewhere, nothing comes from elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from examples import DOCS, ROOT
from isotune.adapters.registry import BUILT_IN

MKDOCS = ROOT / "mkdocs.yml"


def in_navigation(entries: list[Any]) -> Iterator[str]:
    for entry in entries:
        for found in entry.values() if isinstance(entry, dict) else [entry]:
            yield from in_navigation(found) if isinstance(found, list) else [found]


def test_the_navigation_names_every_page_and_only_pages() -> None:
    named = list(in_navigation(yaml.safe_load(MKDOCS.read_text())["nav"]))
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert len(named) == len(set(named))
    assert not pages - set(named), f"put into the nav of mkdocs.yml: {', '.join(sorted(pages - set(named)))}"
    assert not set(named) - pages, f"in the nav of mkdocs.yml, but not in docs/: {set(named) - pages}"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    folder = tmp_path_factory.mktemp("site")
    made = subprocess.run([sys.executable, DOCS / "build.py", folder], capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout + made.stderr
    return folder


def test_every_method_has_a_page_that_its_table_leads_to(site: Path) -> None:
    table = (site / "methods.html").read_text()
    for name in BUILT_IN:
        page = (site / "methods" / f"{name}.html").read_text()
        assert "What it can do" in page
        assert f'href="methods/{name}.html"' in table
    assert 'href="methods/hra.html"' in (site / "choosing.html").read_text()
    hra = (site / "methods" / "hra.html").read_text()
    assert "https://arxiv.org/abs/2405.17484" in hra
    assert "Householder reflection adaptation" in hra
    assert "whole number &gt; 0" in hra


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        fetched = re.findall(r"<(?:script|img|iframe|source)[^>]+src=\"?(?:https?:)?//[^\s\">]+", page.read_text())
        fetched += re.findall(r"<link[^>]+href=\"?(?:https?:)?//[^\s\">]+", page.read_text())
        assert not fetched, f"{page.relative_to(site)}: {fetched}"
    for style in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(?:https?:)?//", style.read_text()), style
