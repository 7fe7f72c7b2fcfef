"""The committed README is what the committed results say."""

from __future__ import annotations

import copy
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from benchmarks import render
from benchmarks.goals import Goal, goals
from benchmarks.plots import log_log
from benchmarks.store import read_results

RESULTS = render.HERE / "results"


def test_the_readme_and_the_plots_are_those_of_the_results() -> None:
    files = render.render(read_results(RESULTS), read_results(RESULTS, "cuda"))
    for path, text in files.items():
        assert (render.HERE / path).read_text() == text, f"{path} is stale: run python -m benchmarks.render"


def test_no_plot_is_left_behind() -> None:
    files = render.render(read_results(RESULTS), read_results(RESULTS, "cuda"))
    assert {f"results/{file.name}" for file in RESULTS.glob("*.svg")} == files.keys() - {"README.md"}


def test_a_full_run_is_preferred_to_a_quick_one(tmp_path: Path) -> None:
    for name, quick in (("cpu-layer", False), ("cpu-quick-layer", True), ("cpu-quick-conv", True)):
        result = {"section": name.rpartition("-")[2], "settings": {"quick": quick}}
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    found = read_results(tmp_path)
    assert {section: result["settings"]["quick"] for section, result in found.items()} == {
        "layer": False,
        "conv": True,
    }


def test_a_promise_is_met_missed_or_not_measured() -> None:
    assert Goal("", 1.0, 0.9).verdict == "met"
    assert Goal("", 1.0, 1.1).verdict == "**missed**"
    assert Goal("", 20, 27, at_least=True).verdict == "met"
    assert Goal("", 1.0, None).verdict == "not measured"


def test_without_results_every_promise_is_unmeasured() -> None:
    assert {goal.verdict for goal in goals({})} == {"not measured"}


def test_a_changed_figure_changes_the_readme() -> None:
    results = read_results(RESULTS)
    changed = copy.deepcopy(results)
    changed["layer"]["rows"][0]["contenders"]["isotune-hra"]["total"]["median"] *= 2
    assert render.render(results, {})["README.md"] != render.render(changed, {})["README.md"]


def test_a_plot_is_valid_svg_with_a_point_for_each_value() -> None:
    root = ET.fromstring(log_log("t", "x", "y", {"a": [(1, 1.0), (10, 20.0)], "b": [(1, 2.0)], "none": []}))
    assert len(root.findall("{http://www.w3.org/2000/svg}circle")) == 3


def test_one_point_alone_can_be_drawn() -> None:
    assert "NaN" not in log_log("t", "x", "y", {"a": [(8, 0.5)]})


@pytest.mark.parametrize("section", ["layer", "conv", "growth", "model", "memory", "disk"])
def test_the_results_name_their_machine(section: str) -> None:
    assert read_results(RESULTS)[section]["machine"]["cpu"]
