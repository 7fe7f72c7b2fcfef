"""What mkdocs adds to the pages: one page a method, made at build time from the code."""

from __future__ import annotations

import re
from typing import Any

from mkdocs.structure.files import File, Files

import isotune
from isotune.adapters.registry import BUILT_IN, method_class
from isotune.cli.method_pages import method_page

FAMILIES = {"orthogonal": "Orthogonal", "low_rank": "Low rank", "spectral": "Spectral"}


def on_config(config: Any) -> Any:
    """Put a section for each family of methods under the entry "Methods" of the navigation."""
    (methods,) = (entry["Methods"] for entry in config.nav if "Methods" in entry)
    for family, title in FAMILIES.items():
        names = [name for name, where in BUILT_IN.items() if f".{family}." in where]
        methods.append({title: [{name: f"methods/{name}.md"} for name in names]})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages."""
    for found in isotune.methods():
        if found.name in BUILT_IN:
            content = method_page(found, method_class(found.name))
            files.append(File.generated(config, f"methods/{found.name}.md", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead to the methods' pages, where the Markdown leads to the sections below the table, which are cut off."""
    if page.file.src_uri == "methods.md":
        page.meta["hide"] = ["toc"]  # the table is wide, and there is one section
        table = markdown[: markdown.index("\n## ")]
        return re.sub(r"\]\(#(\w+)\)", r"](methods/\1.md)", table)
    return re.sub(r"methods\.md#(\w+)\)", r"methods/\1.md)", markdown)
