"""The page as text: what is in it, what is not, and how large it is."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import pytest
from run_folders import write_run
from sweeps import diagnosis, row, summary, sweep, write_comparison
from test_report_data import write_adapter

from isotune.comparison.results import Row, Summary
from isotune.errors import IsotuneError
from isotune.intervals import Interval
from isotune.report.data import Diagnosed, collect
from isotune.report.figures.angles import histogram
from isotune.report.figures.figure import error_bar, styles, thinned
from isotune.report.figures.heatmap import place
from isotune.report.figures.lines import log_axis
from isotune.report.figures.pareto import Cost, apart, front
from isotune.report.page import build, render
from isotune.report.sections import sections
from isotune.report.verdict import judge
from isotune.report.words import brief, interval, listed, memory, number, score, share

CSS = (files("isotune.report") / "assets" / "page.css").read_text(encoding="utf-8")


def element(page: str, key: str) -> str:
    """What is inside the script element with this id."""
    found = re.search(rf'<script[^>]* id="{key}">(.*?)</script>', page, re.S)
    assert found is not None
    return found[1]


def test_the_page_names_nothing_outside_itself(page: Path) -> None:
    class Links(HTMLParser):
        found: list[str] = []  # noqa: RUF012

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.found += [value or "" for key, value in attrs if key in ("src", "href", "action", "poster")]

    links = Links()
    text = page.read_text()
    links.feed(text)
    assert len(links.found) > 5
    assert [link for link in links.found if not link.startswith(("#", "data:,"))] == []
    assert "default-src 'none'" in text


def test_a_sweep_of_two_hundred_units_stays_under_five_megabytes(tmp_path: Path) -> None:
    folder = sweep(tmp_path / "sweep", budgets=(9216, 36864, 73728))
    collected = collect([folder])
    assert len(collected.comparisons[0].units) >= 200
    collected.diagnoses = [Diagnosed(f"model {i}", "hra", diagnosis(str(i), 24, True, True)) for i in range(12)]
    assert len(render(collected, judge(collected)).encode()) < 5_000_000


def test_the_data_is_in_the_page_for_machines(page: Path, scicite: Path) -> None:
    found = json.loads(element(page.read_text(), "isotune-data"))
    assert found["comparisons"][0]["summary"] == Summary.read(scicite / "summary.json").model_dump()
    assert len(found["comparisons"][0]["units"]) == 154
    assert found["verdicts"][0]["ranking"][0]["best"]["method"] == "hra"
    assert {site["site"] for site in found["diagnoses"][0]["sites"]} >= {"encoder.layer.0.attention.self.query"}


def test_verdict_and_tables_need_no_script(page: Path) -> None:
    text = re.sub(r"<script.*?</script>", "", page.read_text(), flags=re.S)
    assert "cannot be told apart from" in text
    assert text.count("<table") > 20
    for word in ("Learning rates searched", "hra at 73,728", "Rotation angles", "83.7 ± 1.0 %"):
        assert word in text


def test_every_figure_has_a_name_and_a_table_beneath(page: Path) -> None:
    text = page.read_text()
    shown = re.findall(r"<figure data-plot=.*?</figure>", text, re.S)
    assert len(shown) == len(json.loads(element(text, "isotune-plots"))) > 10
    for figure in shown:
        assert (
            re.search(r'<figcaption id="([^"]+)">', figure)[1] in re.search(r'aria-labelledby="([^"]+)"', figure)[1]
        )
        assert "<table" in figure


def test_names_from_files_cannot_become_markup(tmp_path: Path) -> None:
    evil = "</script><img src=x onerror=alert(1)>"
    rows = [row(evil, [0.8, 0.9]), row("lora", [0.7, 0.75])]
    folder = write_comparison(tmp_path / "c", summary(rows, model=evil))
    (folder / "comparison.yaml").write_text(evil)
    text = build_text(folder, tmp_path)
    assert evil not in text
    assert "<img" not in text
    assert json.loads(element(text, "isotune-data"))["comparisons"][0]["summary"]["model"] == evil


def test_what_is_not_finite_becomes_null(tmp_path: Path) -> None:
    rows = [row("hra", [0.8, 0.9], seconds_per_step=math.nan), row("lora", [0.7, 0.75])]
    folder = write_comparison(tmp_path / "c", summary(rows))
    data = json.loads(element(build_text(folder, tmp_path), "isotune-data"))
    assert data["comparisons"][0]["summary"]["rows"][0]["seconds_per_step"] is None


def build_text(folder: Path, tmp_path: Path) -> str:
    """The page of one folder, without a diagnosis."""
    build([folder], tmp_path / "report.html", diagnose=False)
    return (tmp_path / "report.html").read_text()


def test_runs_and_merges_have_their_sections(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "one"), write_run(tmp_path / "two", "full"), write_adapter(tmp_path / "m", True)]
    collected = collect(folders)
    keys = [section.key for section in sections(collected)]
    assert keys == ["runs", "run-curves", "merging", "reproduce"]
    text = render(collected, judge(collected))
    assert "one (hra) with 1,234 trainable parameters: test accuracy 80.0 %." in text
    assert "Single runs rank nothing" in text
    assert "2 models merged by ties; writing it at its rank lost 3.1 % of the change" in text
    plots = json.loads(element(text, "isotune-plots"))
    assert plots["merging/merge-0"]["norm of the merged change"]["data"][0]["x"] == [1.5, 2.5]
    assert plots["merging/merge-0"]["relative error of the rank"]["data"][0]["x"] == [0.02, 0.04]
    assert len(plots["run-curves/curves-runs"]["training loss"]["data"]) == 2


def test_a_runs_accuracy_has_the_interval_that_its_rows_give_it(tmp_path: Path) -> None:
    file = write_run(tmp_path / "one") / "metrics.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"test_accuracy_interval": [0.763, 0.833]}))
    said = judge(collect([tmp_path / "one"]))[0].headlines[0]
    assert said.endswith("test accuracy 80.0 % (95 % interval by the draw of the rows: 76.3 to 83.3 %).")


def test_each_label_has_its_line_and_confusions_their_map(tmp_path: Path) -> None:
    """One run with rows of a label each, and one whose entities are confused with nothing."""
    cat = {"support": 4, "precision": 1.0, "recall": 0.75, "f1": 6 / 7, "predicted": {"cat": 3, "dog": 1}}
    dog = {"support": 0, "precision": 0.0, "recall": 0.0, "f1": 0.0, "predicted": {}}
    per = {"support": 5, "precision": 0.5, "recall": 0.4, "f1": 4 / 9}
    folders = [write_run(tmp_path / name) for name in ("one", "two")]
    found = [{"test_labels": {"cat": cat, "dog": dog}}, {"validation_labels": {"PER": per}}]
    for folder, labels in zip(folders, found, strict=True):
        file = folder / "metrics.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | labels))
    collected = collect(folders)
    section = next(section for section in sections(collected) if section.key == "labels")
    (table,) = section.tables
    assert [cell.text for cell in table.rows[0]] == ["PER", "5", "50.0 %", "40.0 %", "44.4 %", ""]
    (figure,) = section.figures
    assert figure.table is not None
    assert [cell.text for cell in figure.table.rows[0]] == ["cat", "4", "100 %", "75.0 %", "85.7 %", "dog 1"]
    plots = json.loads(element(render(collected, judge(collected)), "isotune-plots"))["labels/labels-0"]
    assert plots["share"]["data"][0]["z"] == [[75.0, 25.0], [None, None]]
    assert plots["rows"]["data"][0]["z"] == [[3.0, 1.0], [0.0, 0.0]]
    assert plots["rows"]["data"][0]["zmax"] == 3


def test_the_curves_of_runs_are_of_what_they_are_judged_by(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one")
    history = [{"step": step, "eval_loss": 0.3, "eval_accuracy": 0.8, "eval_matthews": 0.6} for step in (10, 20)]
    (folder / "history.json").write_text(json.dumps(history))
    for line, curve in (("", "validation accuracy"), ("metric: matthews\n", "validation matthews")):
        recipe = folder / "recipe.yaml"
        recipe.write_text(recipe.read_text() + line)
        plots = json.loads(element(build_text(folder, tmp_path), "isotune-plots"))
        assert next(iter(plots["run-curves/curves-runs"])) == curve


def test_a_single_validation_is_no_curve_and_stands_last(tmp_path: Path) -> None:
    plots = json.loads(element(build_text(write_run(tmp_path / "one"), tmp_path), "isotune-plots"))
    assert next(iter(plots["run-curves/curves-runs"])) == "training loss"
    rows = [row("hra", [0.8, 0.9], 10), row("lora", [0.7, 0.8], 10)]
    curve = [
        {"step": 5, "loss": 0.9},
        {"step": 10, "loss": 0.8},
        {"step": 10, "eval_loss": 1.0, "eval_accuracy": 0.8},
    ]
    units = [
        {"unit": f"hra-{seed}", "kind": "seed", "status": "done", "method": "hra", "budget": 10, "curve": curve}
        for seed in (1, 2)
    ]
    folder = write_comparison(tmp_path / "c", summary(rows), units)
    plots = json.loads(element(build_text(folder, tmp_path), "isotune-plots"))
    assert next(iter(plots["curves/curves-10"])) == "training loss"


def test_two_comparisons_stand_one_after_the_other(tmp_path: Path) -> None:
    folders = [
        write_comparison(tmp_path / n, summary([row("hra", [0.8, 0.9]), row("lora", [0.7, 0.8])])) for n in "ab"
    ]
    found = sections(collect(folders))
    assert [s.title for s in found if s.key.startswith("results")] == ["Results: a", "Results: b"]
    assert len({s.key for s in found}) == len(found)


def test_models_are_shown_side_by_side_with_their_intruders_marked(page: Path) -> None:
    plots = json.loads(element(page.read_text(), "isotune-plots"))
    spectra = [plots[f"spectra/spectrum-{i}"]["encoder.layer.1.attention.self.query"] for i in range(3)]
    marked = [[t["x"] for t in plot["data"] if t["name"] == "intruder dimension"] for plot in spectra]
    assert marked == [[[2, 5]], [[2, 5]], []]
    heat = [plots[f"changes/heat-{i}"]["relative change (%)"]["data"][0] for i in range(3)]
    assert len({trace["zmax"] for trace in heat}) == 1
    assert heat[0]["x"] == ["query", "value"]
    assert [len(trace["z"]) for trace in heat] == [6, 6, 6]
    assert [key for key in plots if key.startswith("angles/")] == ["angles/angles-0"]


def test_an_output_that_cannot_be_written_is_refused(scicite: Path, tmp_path: Path) -> None:
    with pytest.raises(IsotuneError, match="is a folder; name a file"):
        build([scicite], tmp_path, diagnose=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(IsotuneError, match="cannot be written"):
        build([scicite], tmp_path / "file" / "report.html", diagnose=False)


def test_without_plotly_the_message_says_what_to_install(
    scicite: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("isotune.report.page.has_plotly", lambda: False)
    with pytest.raises(IsotuneError, match=r"pip install 'isotune\[report\]'"):
        build([scicite], tmp_path / "report.html")


def test_bars_end_where_a_metric_does() -> None:
    even, cut = Interval(0.9, 0.05), Interval(0.98, 0.05)
    assert error_bar("accuracy", [even], "red")["array"] == [5.0]
    assert "arrayminus" not in error_bar("accuracy", [even, Interval(0.7)], "red")
    bar = error_bar("accuracy", [even, cut], "red")
    assert (bar["symmetric"], bar["array"], bar["arrayminus"]) == (False, pytest.approx([5, 2]), [5.0, 5.0])


def test_the_front_holds_what_nothing_cheaper_beats() -> None:
    scores = {"a": (0.8, 10), "b": (0.7, 20), "c": (0.9, 30)}
    rows = [Row(method=name, values=[score], parameters=size) for name, (score, size) in scores.items()]
    cost = Cost("parameters", "parameters", str)
    assert [row.method for row in front(rows, cost, True)] == ["a", "c"]
    assert [row.method for row in front(rows, cost, False)] == ["a", "b"]


def test_points_of_equal_cost_stand_a_little_apart() -> None:
    assert apart([10, 20, 30]) == [10, 20, 30]
    left, other, right, middle = apart([100, 200, 100.1, 100])
    assert other == 200
    assert 97 < left < middle < right < 103


def test_small_parts_of_figures() -> None:
    assert place("encoder.layer.3.attention.self.query") == (3, "attention.self.query")
    assert place("layer1.conv") == (None, "layer1.conv")
    assert place("blocks.0") == (None, "blocks.0")
    assert brief(["attention.self.query", "attention.output.dense", "output.dense", "a", "a"]) == [
        "query", "attention.output.dense", "output.dense", "a", "a"
    ]  # fmt: skip
    assert sum(histogram([0.0, 90.0, 180.0])) == 3
    assert thinned(range(1000), 5) == [0, 250, 500, 749, 999]
    ticks = log_axis([1e-3, 3e-2])
    assert ticks["ticktext"] == ["0.001", "0.002", "0.005", "0.01", "0.02"]
    assert log_axis([1e-9, 1e9])["tickvals"] == sorted(set(log_axis([1e-9, 1e9])["tickvals"]))
    assert len(log_axis([1e-9, 1e9])["tickvals"]) <= 8
    found = styles([f"m{i}" for i in range(30)])
    assert len({(s.colour, s.symbol, s.dash) for s in found.values()}) == 32


def test_numbers_are_written_as_people_read_them() -> None:
    assert score("accuracy", 0.8374, 0.0042) == "83.7 ± 0.4 %"
    assert score("accuracy", -0.0123, 0.004, signed=True) == "−1.2 ± 0.4 points"
    assert score("loss", 2.11, 0.02) == "2.110 ± 0.020"
    assert score("accuracy", 0.98, 0.05) == "98.0 (93.0 to 100.0) %"
    assert score("accuracy", 0.98, 0.05, signed=True) == "+98.0 (93.0 to 100.0) points"
    assert interval("accuracy", Interval(0.98, 0.05)) == "93.0 to 100.0 %"
    assert interval("accuracy", Interval(0.98)) == "–"
    assert score("perplexity", None) == "–"
    assert [number(v) for v in (None, 0, 12345, 0.6123, 1e-7, math.inf)] == [
        "–",
        "0",
        "12,345",
        "0.612",
        "1.00e-07",
        "–",
    ]
    assert [memory(v) for v in (None, 12, 3 * 2**20, 1.5 * 2**30)] == ["–", "12 B", "3 MiB", "1.5 GiB"]
    assert [share(v) for v in (0.041, 0.5, None)] == ["4.1 %", "50.0 %", "–"]
    assert listed(["a", "b", "c"]) == "a, b and c"


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    """WCAG's ratio of two colours."""
    high, low = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def themes() -> list[dict[str, str]]:
    """The colours of the light theme, of the dark one, and of the dark one by the system's preference."""
    blocks = re.findall(r":root[^{}]*\{([^}]*--paper[^}]*)\}", CSS)
    return [dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in blocks]


def test_both_themes_keep_to_the_contrast_of_wcag_aa() -> None:
    light, dark, preferred = themes()
    assert dark == preferred
    for theme in (light, dark):
        for ground in ("paper", "card"):
            for ink in ("ink", "muted", "accent", "warn", "bad"):
                assert contrast(theme[ink], theme[ground]) >= 4.5, (ink, ground)
        for ink, ground in (
            ("ink", "accent-soft"),
            ("accent", "accent-soft"),
            ("warn", "warn-soft"),
            ("ink", "warn-soft"),
        ):
            assert contrast(theme[ink], theme[ground]) >= 4.5, (ink, ground)
        for number_ in range(1, 9):
            assert contrast(theme[f"c{number_}"], theme["card"]) >= 3, number_
