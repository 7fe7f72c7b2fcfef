"""`python docs/build.py [FOLDER]`: the documentation as a site, in site/ where no folder is named.

Zensical builds it from mkdocs.yml and the pages here, with what is made from the code: one page a method.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

import isotune
from isotune.adapters.registry import BUILT_IN, method_class
from isotune.cli.method_pages import method_page
from isotune.cli.optimizers import described, optimizer_section

DOCS = Path(__file__).parent
CONFIG = DOCS.parent / "mkdocs.yml"
FAMILIES = {
    "orthogonal": "Orthogonal", "low_rank": "Low rank", "spectral": "Spectral", "sparse": "Sparse",
    "bottleneck": "Beside a block", "mixture": "Mixtures",
}  # fmt: skip
SHOWN = (".md", ".css", ".html", ".png")
"""What of docs/ belongs to the site."""
REFERENCES = ("methods.md", "optimizers.md")
"""Tables with sections that have pages of their own in the site."""


def build(site: Path) -> None:
    """Build the site. Ends the program where Zensical finds anything to warn of, such as a broken link."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch)
        config = yaml.safe_load(CONFIG.read_text())
        add_families(config["nav"])
        (source / "mkdocs.yml").write_text(yaml.safe_dump({**config, "site_dir": "site"}, sort_keys=False))
        copy_pages(source / config["docs_dir"])
        command = [Path(sys.executable).parent / "zensical", "build", "--strict"]
        done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(re.sub(r"\x1b\[[\d;]*m", "", done.stdout) or done.stderr)
        if site.exists():
            if any(site.iterdir()) and not (site / "sitemap.xml").is_file():
                sys.exit(f"{site} is not empty and holds no site that was built before; name another folder")
            shutil.rmtree(site)
        shutil.copytree(source / "site", site)


def add_families(nav: list[dict[str, Any]]) -> None:
    """Put a section for each family of methods under the entry "Methods" of the navigation, and all optimizers."""
    (optimizers,) = (entry["Optimizers"] for entry in nav if "Optimizers" in entry)
    optimizers.extend({one.name: f"optimizers/{one.name}.md"} for one in described())
    (methods,) = (entry["Methods"] for entry in nav if "Methods" in entry)
    for family, title in FAMILIES.items():
        names = [name for name, where in BUILT_IN.items() if f".{family}." in where]
        methods.append({title: [{name: f"methods/{name}.md"} for name in names]})


def copy_pages(folder: Path) -> None:
    """The pages, and one for each method and each optimizer."""
    for file in DOCS.rglob("*"):
        if file.suffix in SHOWN:
            target = folder / file.relative_to(DOCS)
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".md":
                target.write_text(linked(file.read_text(), file.name))
            else:
                shutil.copyfile(file, target)
    (folder / "optimizers").mkdir()
    for one in described():
        (folder / "optimizers" / f"{one.name}.md").write_text(optimizer_section(one, "#") + "\n")
    (folder / "methods").mkdir()
    for found in isotune.methods():
        if found.name in BUILT_IN:
            (folder / "methods" / f"{found.name}.md").write_text(method_page(found, method_class(found.name)))


def linked(markdown: str, name: str) -> str:
    """Lead to pages of their own, where the Markdown leads to the sections below a table, which are cut off."""
    if name in REFERENCES:
        table = markdown[: markdown.index("\n## ")]
        table = re.sub(r"\]\(#(\w+)\)", rf"]({name.removesuffix('.md')}/\1.md)", table)
        return f"---\nhide: [toc]\n---\n\n{table}"  # the table is wide, and there is one section
    return re.sub(r"(methods|optimizers)\.md#(\w+)\)", r"\1/\2.md)", markdown)


if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS.parent / "site")
