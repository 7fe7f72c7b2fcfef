"""The cost of merging many adapters: every rule runs at a tiny size, and the page is what the figures say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import merging_scale
from benchmarks.one_merge import one_merge
from isotune.adapters.low_rank.lora import LoRA
from isotune.adapters.orthogonal.hra import HRA
from isotune.checkpoint.read import read_stored
from isotune.merging.registry import rule_class

SMALL = ["--layers", "1", "--models", "3", "--rank", "2", "--width", "24", "--threads", "1"]


def run(folder: Path, *more: str) -> tuple[dict[str, Any], str]:
    results, page = folder / "results.json", folder / "page.md"
    merging_scale.main(
        [*SMALL, "--folder", str(folder / "runs"), "--results", str(results), "--page", str(page), *more]
    )
    return json.loads(results.read_text()), page.read_text()


def test_a_rule_is_measured_in_a_process_of_its_own_and_kept(tmp_path: Path) -> None:
    first, page = run(tmp_path, "--rules", "sum")
    found = first["rules"]["sum"]
    assert (found["models"], found["rank"], found["error"]) == (3, 6, 0)
    assert found["peak_bytes"] > found["added_bytes"] > 0
    assert found["seconds"] > 0
    assert found["cpu_seconds"] > 0
    assert page == merging_scale.page(first)
    assert "| sum | 3 |" in page
    assert "not the size at which anything is promised" in page
    again, _ = run(tmp_path, "--rules", "sum")
    assert again["rules"] == first["rules"]
    assert not list(tmp_path.glob("runs/*/merged"))


@pytest.mark.parametrize(("rule", "kind"), merging_scale.candidates().items())
def test_every_rule_merges_the_adapters_that_it_is_measured_on(rule: str, kind: str, tmp_path: Path) -> None:
    given = merging_scale.parsed(SMALL)
    method = HRA(rank=2) if kind == "rotations" else LoRA(rank=2)
    adapters = [
        merging_scale.write_random(tmp_path / f"{number}", method, given, number)
        for number in range(rule_class(rule).models[1] or 3)
    ]
    figures = one_merge(rule, tmp_path / "merged", adapters)
    assert figures["written_bytes"] > 0
    assert not (tmp_path / "merged").exists()


def test_adapters_are_drawn_apart_and_stored_in_the_dtype_asked_for(tmp_path: Path) -> None:
    given = merging_scale.parsed([*SMALL, "--dtype", "bfloat16"])
    states = [
        read_stored(merging_scale.write_random(tmp_path / f"{n}", LoRA(rank=2), given, n)).state for n in range(2)
    ]
    layers = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]
    assert [list(state) for state in states] == [layers, layers]
    for name, tensor in states[0][layers[0]].items():
        assert tensor.dtype == torch.bfloat16
        assert not tensor.equal(states[1][layers[0]][name])
        assert tensor.any()


def test_a_missed_promise_is_said() -> None:
    row = {
        "kind": "changes", "models": 20, "seconds": 12.0, "cpu_seconds": 20.0, "peak_bytes": 10**9,
        "added_bytes": 7 * 10**8, "read_bytes": 671 * 10**6, "written_bytes": 671 * 10**6, "rank": 320, "error": 0.0,
    }  # fmt: skip
    result: dict[str, Any] = {
        "date": "2026-01-01",
        "machine": {"cpu": "a processor", "cores": 2, "load_at_start": 0.5},
        "versions": {"torch": "2"},
        "settings": {**merging_scale.SIZE, "dtype": "float32", "threads": 2},
        "rules": {"sum": row, "ties": {**row, "kind": "entries", "seconds": 500.0}},
    }
    assert "60 seconds and 2000 MB in all; kept by all of them." in merging_scale.page(result)
    result["rules"]["linear"] = {**row, "peak_bytes": 3 * 10**9}
    assert "missed by linear." in merging_scale.page(result)


def test_the_committed_page_is_what_its_figures_say() -> None:
    if not merging_scale.RESULTS.is_file():
        pytest.skip("nothing is committed")
    assert merging_scale.PAGE.read_text() == merging_scale.page(json.loads(merging_scale.RESULTS.read_text()))
