"""The rooms of the house: a module imports from its own room and from those below it, never from above."""

from __future__ import annotations

import ast
from pathlib import Path

import isotune

ROOT = Path(isotune.__file__).parent
ROOMS = (
    "cli", "report", "comparison", "training", "integrations", "merging", "statistics", "diagnostics", "checkpoint",
    "model", "adapters", "sites", "linalg",
)  # fmt: skip
GROUND = len(ROOMS)
BETWEEN = {"adapted_site": ROOMS.index("sites")}
"""Modules that stand by themselves, with the room whose height they have."""


def height(parts: tuple[str, ...]) -> int:
    """The place of a module in the list of rooms, the higher the number the lower the room."""
    if parts[0] in ROOMS:
        return ROOMS.index(parts[0])
    return BETWEEN.get(parts[0].removesuffix(".py"), GROUND)


def imported(file: Path) -> set[tuple[str, ...]]:
    """The modules of isotune that a file imports, at any place, but for types alone."""
    found = set()
    for node in _run(ast.parse(file.read_text(encoding="utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {tuple(name.split(".")[1:]) for name in names if name.startswith("isotune.")}
    return found


def _run(node: ast.AST) -> list[ast.AST]:
    """The nodes that run: those under `if TYPE_CHECKING` do not."""
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return []
    return [node, *(inner for child in ast.iter_child_nodes(node) for inner in _run(child))]


def test_imports_only_go_down() -> None:
    upwards = [
        f"{file.relative_to(ROOT)} imports {'.'.join(parts)}"
        for file in sorted(ROOT.rglob("*.py"))
        if file.parent != ROOT or file.stem in BETWEEN
        for parts in imported(file)
        if height(parts) < height(file.relative_to(ROOT).parts)
    ]
    assert upwards == []
