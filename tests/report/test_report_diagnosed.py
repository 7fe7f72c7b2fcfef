"""Real diagnoses in a report: a full fine-tuning, a LoRA and an HRA of one model, side by side."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from run_folders import trained_runs
from test_report_page import element

from isotune.diagnostics import diagnose
from isotune.report import build


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    build(trained_runs(folder), folder / "report.html", progress=False)
    return folder


def test_the_three_stand_side_by_side_with_what_diagnose_finds(folder: Path) -> None:
    data = json.loads(element((folder / "report.html").read_text(), "isotune-data"))
    assert data["notes"] == []
    assert [one["label"] for one in data["diagnoses"]] == ["full-run", "lora-run", "hra-run"]
    for one in data["diagnoses"]:
        found = diagnose(folder / one["label"], folder / "base", side="both", progress=False).to_dict()
        assert one["total"] == found["total"]
        assert one["total"]["intruders"] == sum(len(site["intruders"]) for site in one["sites"])


def test_their_spectra_maps_and_angles_are_drawn(folder: Path) -> None:
    plots = json.loads(element((folder / "report.html").read_text(), "isotune-plots"))
    (site,) = set(re.findall(r"<option selected>(encoder[^<]*)<", (folder / "report.html").read_text()))
    before = [plots[f"spectra/spectrum-{i}"][site]["data"][0]["y"] for i in range(3)]
    assert site.endswith("query")
    assert before[0] == before[1] == before[2]
    full, lora, hra = (plots[f"changes/heat-{i}"]["relative change (%)"]["data"][0]["z"] for i in range(3))
    assert all(value > 0 for grid in (lora, hra) for line in grid for value in line)
    assert sum(value > 0 for line in full for value in line if value is not None) == 2
    # HRA of rank 4 turns two planes of a layer, or reflects four directions; nothing else has angles.
    assert [key for key in plots if key.startswith("angles/")] == ["angles/angles-0"]
    assert sum(plots["angles/angles-0"][""]["data"][0]["y"]) > 0


def test_the_page_says_how_far_each_moved(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    assert "Change of the weights: full-run" in text
    assert "intruder dimension" in text


def test_a_base_that_is_gone_is_noted(folder: Path, tmp_path: Path) -> None:
    build([folder / "full-run"], tmp_path / "report.html", base=tmp_path / "none", progress=False)
    data = json.loads(element((tmp_path / "report.html").read_text(), "isotune-data"))
    assert data["diagnoses"] == []
    (note,) = data["notes"]
    assert "full-run was not diagnosed" in note
    assert str(tmp_path / "none") in note
