"""What an experiment gave: tables as Markdown, and a page of pictures of the first seed."""

from __future__ import annotations

from pathlib import Path

import tables
import torch
from base import Base
from condition import reported
from contenders import Asked, Results, Row
from grid import page, save
from looks import SUBJECTS, dressed, outlines
from subject import diversity, likeness


def text(name: str, base: Base, results: Results) -> str:
    """The tables of one of the experiments."""
    groups, two = (tables.grouped(results.rows, kind) for kind in (name, "two"))
    if name == "condition":
        shown = [tables.table(groups, tables.CONDITION), tables.differences(groups, tables.CONDITION, "hra")]
    else:
        shown = [
            tables.table(groups, tables.SUBJECT, real_pictures(base)),
            tables.differences(groups, tables.SUBJECT, "hra, with prior"),
            tables.table(two, tables.TWO),
            tables.differences(two, tables.TWO, "hra"),
        ]
    return "\n\n".join(shown)


def real_pictures(base: Base) -> Row:
    """How like those of training the test pictures of the subject are, and how unlike each other."""
    ours, theirs = (dressed(p.of(SUBJECTS[0].digit), SUBJECTS[0].look) for p in (base.train_on, base.test_on))
    return {"likeness": likeness(base, ours, theirs), "diversity": diversity(theirs)}


def draw(name: str, base: Base, asked: Asked, results: Results, file: Path) -> None:
    """Write a page with a row for each method, of the pictures with the first seed."""
    if name == "condition":
        real = reported(base, asked)
        rows, headings = {"outline": [outlines(real.x)[:20] * 2 - 1], "real": [real.x[:20]]}, ["test pictures"]
    else:
        first = dressed(base.test_on.of(SUBJECTS[0].digit), SUBJECTS[0].look)[:8]
        rows = {"real": [first, *(torch.full((n, 1, 8, 8), -1.0) for n in (9, 6, 9))]}
        headings = ["the subject", "other digits in its look", "its digit, plain", "other digits, plain"]
    for key in results.rows:
        kind, method, *rest, seed = key.split("/")
        if (kind, seed) == (name, "1"):
            made = list(results.pictures(key).values())
            label = f"{method} without prior" if rest[-1:] == ["alone"] else method
            rows[label] = [group[: len(first)] for group, first in zip(made, rows["real"], strict=True)]
    save(page(rows, headings), file)
