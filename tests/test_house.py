"""The rooms of the house: a module imports from its own room and those below, never from above, never in a ring."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import isotune

ROOT = Path(isotune.__file__).parent
ROOMS = (
    "cli", "report", "comparison", "training", "integrations", "merging", "statistics", "diagnostics", "checkpoint",
    "model", "adapters", "sites", "optim", "kernels", "linalg",
)  # fmt: skip
GROUND = len(ROOMS)
BETWEEN = {"adapted_site": ROOMS.index("sites")}
"""Modules that stand by themselves, with the room whose height they have."""


def height(parts: tuple[str, ...]) -> int:
    """The place of a module in the list of rooms, the higher the number the lower the room."""
    if parts[0] in ROOMS:
        return ROOMS.index(parts[0])
    return BETWEEN.get(parts[0].removesuffix(".py"), GROUND)


def imported(file: Path, inside: bool = True) -> set[tuple[str, ...]]:
    """The modules of isotune that a file imports, but for types alone; `inside`, in functions too."""
    found = set()
    for node in _run(ast.parse(file.read_text(encoding="utf-8")), inside):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {tuple(name.split(".")[1:]) for name in names if name.startswith("isotune.")}
    return found


def _run(node: ast.AST, inside: bool) -> list[ast.AST]:
    """The nodes that run: those under `if TYPE_CHECKING` do not, those in functions, unless `inside`, later."""
    if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        return []
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not inside:
        return []
    return [node, *(one for child in ast.iter_child_nodes(node) for one in _run(child, inside))]


def test_imports_only_go_down() -> None:
    upwards = [
        f"{file.relative_to(ROOT)} imports {'.'.join(parts)}"
        for file in sorted(ROOT.rglob("*.py"))
        for parts in imported(file)
        if height(parts) < height(file.relative_to(ROOT).parts)
    ]
    assert upwards == []


def test_no_modules_import_each_other() -> None:
    modules = {file.relative_to(ROOT).with_suffix("").parts: file for file in ROOT.rglob("*.py")}
    by_name = {parts[:-1] if parts[-1] == "__init__" else parts: file for parts, file in modules.items()}
    graph = {name: imported(file, inside=False) & by_name.keys() - {name} for name, file in by_name.items()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" imports ".join(".".join(name) for name in reversed(error.args[1])))


def test_the_map_of_the_house_names_the_rooms_in_their_order() -> None:
    (rooms,) = re.findall(r"```\n(cli .*?)\(ground\)", (ROOT.parents[1] / "CONTRIBUTING.md").read_text(), re.DOTALL)
    assert tuple(line.split()[0] for line in rooms.splitlines()) == ROOMS
    assert {path.name for path in ROOT.iterdir() if (path / "__init__.py").is_file()} == set(ROOMS)


def test_no_class_has_the_name_of_another() -> None:
    homes: dict[str, list[str]] = {}
    for file in sorted(ROOT.rglob("*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(str(file.relative_to(ROOT)))
    assert {name: files for name, files in homes.items() if len(files) > 1} == {}


SHAPED_ROOMS = ("adapters", "diagnostics", "linalg", "merging", "sites", "statistics")
SHAPE = re.compile(r"\([^()]*(,| x )[^()]*\)|\((Σ )?\w+\)|\bshapes?\b|\bnumber\b|\bscalar\b")
"""How a docstring names a shape: (m, n), (out x r), (k), or in words."""


def public(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """The public functions, and the public methods of public classes, by name."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public(node.body, f"{node.name}.")
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield prefix + node.name, node


def takes_tensors(function: ast.FunctionDef) -> bool:
    """Whether a tensor, or a sequence of them, goes in or comes out; tables of them by name have many shapes."""
    arguments = [one.annotation for one in (*function.args.args, *function.args.kwonlyargs)]
    said = " ".join(ast.unparse(note) for note in (*arguments, function.returns) if note is not None)
    return "Tensor" in re.findall(r"\w+", re.sub(r"(dict|Mapping|Callable)\[[^]]*\]*", "", said))


def test_functions_of_tensors_name_their_shapes() -> None:
    silent = [
        f"{file.relative_to(ROOT)}: {name}"
        for room in SHAPED_ROOMS
        for file in sorted((ROOT / room).rglob("*.py"))
        for name, function in public(ast.parse(file.read_text()).body)
        if takes_tensors(function) and (said := ast.get_docstring(function)) and not SHAPE.search(said)
    ]
    assert silent == []
