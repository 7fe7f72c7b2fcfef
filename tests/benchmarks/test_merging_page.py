"""The comparison of merging rules: its data, and a page that is what the figures say."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import merging


def cell(title: str, seed: int, accuracy: float, **more: Any) -> dict[str, Any]:
    return {"title": title, "method": "lora", "rank": 4, "seed": seed, "accuracy": {"a": accuracy}, **more}


def result() -> dict[str, Any]:
    cells = []
    for seed, alone in ((1, 0.9), (2, 0.8)):
        cells.append(cell("alone, lora", seed, alone, bare={"a": 0.4}))
        for rule, share in (("sum", 0.5), ("ties", 0.75)):
            figures = {"scale": 0.1 * seed, "merged_rank": 8, "error": 0.25}
            cells.append(cell(f"{rule} of lora", seed, share * alone, rule=rule, **figures))
    return {
        "date": "2026-01-01",
        "machine": {"cpu": "a processor", "threads": 2},
        "versions": {},
        "settings": {"per_intent": 2, "epochs": 1, "rate": 1e-2, "seeds": 2, "domains": 1},
        "cells": cells,
        "costs": {f"{rule} of lora, rank 4": {"seconds": 2.0, "memory_bytes": 2**20} for rule in ("sum", "ties")},
    }


def test_the_page_ranks_rules_and_relates_them_to_the_adapters_alone() -> None:
    text = merging.page(result())
    rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert [row.split(" | ")[0] for row in rows] == [
        "| alone, lora", "| no adapter, heads of lora", "| ties of lora", "| sum of lora",
    ]  # fmt: skip
    assert "| 85.0 (21.5 to 100.0) | 100.0 ± 0.0 |" in rows[0]
    assert "| 75.0 ± 0.0 | 0.1, 0.2 | 8 | 0.25 | 2.00 | 1 |" in rows[2]


def test_the_committed_page_is_what_its_figures_say() -> None:
    file = merging.DOCS / "merging-compared.json"
    if not file.is_file():
        pytest.skip("no comparison is committed")
    assert (merging.DOCS / "merging-compared.md").read_text() == merging.page(json.loads(file.read_text()))


def test_every_domain_has_its_rows(tmp_path: Path) -> None:
    found = merging.write_data(argparse.Namespace(per_intent=3, output=tmp_path, domains=10))
    assert len(found) == 10
    for files in found.values():
        counts = {split: len(path.read_text().splitlines()) for split, path in files.items()}
        assert counts == {"train": 45, "validation": 60, "test": 300}
        labels = {json.loads(line)["label"] for line in files["train"].read_text().splitlines()}
        assert len(labels) == 15
