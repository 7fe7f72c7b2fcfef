"""The comparison of all methods: sizes at the budget, and a page that is what the figures say."""

from __future__ import annotations

import json
from typing import Any

import pytest
from torch import nn

from benchmarks import accuracy
from isotune.adapters.registry import method_names
from isotune.errors import OptionError
from isotune.sites import require_site

SQUARE = [require_site(nn.Linear(384, 384, device="meta"), str(i)) for i in range(12)]


def test_hra_and_lora_are_sized_to_the_same_budget() -> None:
    assert accuracy.sized("hra", SQUARE) == {"method": {"name": "hra", "rank": 8}, "parameters": 36_864}
    assert accuracy.sized("lora", SQUARE) == {"method": {"name": "lora", "rank": 4}, "parameters": 36_864}


def result(**methods: dict[str, Any]) -> dict[str, Any]:
    common = {"parameters": 36_864, "rate": 1e-3, "step_ratio": 1.0, "peak_memory_bytes": 10**9}
    return {
        "date": "2026-01-01",
        "machine": {"cpu": "a processor", "threads": 2},
        "versions": {},
        "budget": 36_864,
        "rates": [3e-4, 1e-3, 3e-3],
        "seeds": [1, 2],
        "rows": 100,
        "eval_rows": None,
        "probe_accuracy": 0.695,
        "left_out": {"big": "it does not fit"},
        "methods": {
            name: common | {"method": {"name": name}, "difference": None} | row for name, row in methods.items()
        },
    }


def test_the_page_ranks_by_mean_and_marks_rates_at_the_edge() -> None:
    lora = {"accuracy": [0.79, 0.81]}
    best = {"accuracy": [0.84, 0.86], "difference": [0.05, 0.0], "rate": 3e-3, "step_ratio": 1.5}
    text = accuracy.page(result(lora=lora, best=best))
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert [row.split()[1] for row in rows] == ["---", "best", "lora"][-len(rows) :]
    assert "85.0 ± 12.7" in rows[-2]
    assert "+5.0 ± 0.0 | 1.50 | 1.00" in rows[-2]
    assert "0.003 (edge)" in rows[-2]
    assert "69.5" in text
    assert "Left out: big, because it does not fit" in text


def test_the_committed_page_is_what_its_figures_say() -> None:
    file = accuracy.DOCS / "methods-compared.json"
    if not file.is_file():
        pytest.skip("no comparison is committed")
    assert (accuracy.DOCS / "methods-compared.md").read_text() == accuracy.page(json.loads(file.read_text()))


@pytest.mark.parametrize("name", method_names())
def test_every_method_comes_as_near_to_the_budget_as_it_can(name: str) -> None:
    try:
        found = accuracy.sized(name, SQUARE)
    except OptionError as error:
        pytest.fail(f"{name} cannot be compared: {error}")
    assert found["parameters"] > 0
