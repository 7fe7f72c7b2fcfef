"""Tables as plain values: what the template writes and the browser sorts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class TableCell:
    """A cell's text, what it is sorted by, and a mark: best, edge, failed, front, or none."""

    text: str
    value: float | str | None = None
    mark: str = ""
    title: str = ""

    @property
    def sort(self) -> str:
        """The sorting key as the page holds it; empty for what is unknown, which sorts last."""
        if self.value is None:
            return ""
        return self.value if isinstance(self.value, str) else f"{self.value:.9g}"


@dataclass(frozen=True)
class Column:
    """A column's title, whether it holds numbers, and an explanation."""

    title: str
    numeric: bool = True
    hint: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first cell of each row is its header."""

    caption: str
    columns: Sequence[Column]
    rows: list[list[TableCell]] = field(default_factory=list)
    sortable: bool = True


def text(value: str, mark: str = "", title: str = "") -> TableCell:
    """A cell that is sorted by what it says."""
    return TableCell(value, value.lower(), mark, title)


def simple(
    caption: str, titles: Sequence[str], rows: Iterable[Sequence[TableCell | str]], sortable: bool = True
) -> Table:
    """A table whose columns are numeric where all their cells are."""
    cells = [[cell if isinstance(cell, TableCell) else text(cell) for cell in row] for row in rows]
    numeric = [all(not isinstance(row[i].value, str) for row in cells) for i in range(len(titles))]
    return Table(caption, [Column(title, flag) for title, flag in zip(titles, numeric, strict=True)], cells, sortable)
