"""The sections of the report as Markdown: ratios to PEFT's LoRA first, absolute figures of that one beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.contenders import CONTENDERS, PEFTS, REFERENCE
from benchmarks.goals import Goal, describe
from benchmarks.store import Result, Results, median, ratio, rows

OTHERS = tuple(name for name in CONTENDERS if name != REFERENCE)


def table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first column is text and whose others are figures."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def goal_table(promised: Sequence[Goal]) -> str:
    """Target and measured, one promise a row."""
    body = []
    for goal in promised:
        sign = ">=" if goal.at_least else "<="
        got = "" if goal.measured is None else f"{goal.measured:.2f}{goal.unit}"
        note = f" ({goal.note})" if goal.note else ""
        body.append([goal.text + note, f"{sign} {goal.target:g}{goal.unit}", got, goal.verdict])
    return table(["promise", "target", "measured", ""], body)


def ratio_table(result_rows: Sequence[dict[str, Any]], phase: str, unit: str = "ms") -> str:
    """The reference's median with its quartiles, and everyone else as a ratio to it, one case a row."""
    names = [name for name in OTHERS if any(median(row, name, phase) is not None for row in result_rows)]
    body = []
    for row in result_rows:
        reference = row["contenders"].get(REFERENCE, {}).get(phase)
        ratios = [_cell(ratio(row, name, REFERENCE, phase), row, name, phase) for name in names]
        body.append([describe(row["case"]), _absolute(reference, unit), *ratios])
    return table(["case", f"{REFERENCE}, {unit}", *names], body)


def method_table(result_rows: Sequence[dict[str, Any]]) -> str:
    """One method a row: ours and PEFT's as ratios to PEFT's LoRA, then ours against PEFT's; the references first."""
    first = result_rows[0]["contenders"]
    body = [
        [name, "", _absolute(first[name].get("total"), "ms"), "", "", _absolute(first[name].get("saved"), "MiB"), ""]
        for name in ("frozen", REFERENCE)
    ]
    for row in result_rows:
        name = row["case"]["method"]
        ours, theirs = f"isotune-{name}", f"{PEFTS}{name}"
        figures = row["contenders"]
        ratios = [_cell(ratio(row, who, REFERENCE), row, who, "total") for who in (ours, theirs)]
        against = ratio(row, theirs, ours)
        saved = [_absolute(figures.get(who, {}).get("saved"), "MiB") for who in (ours, theirs)]
        trained = "-" if row["trained"] is None else f"{row['trained']:,}"
        body.append([name, trained, *ratios, "-" if against is None else f"{against:.2f}", *saved])
    header = ["method", "parameters", "isotune", "PEFT's own", "times faster", "isotune, MiB", "PEFT's own, MiB"]
    return table(header, body)


def _cell(value: float | None, row: dict[str, Any], name: str, phase: str) -> str:
    if value is None:
        return "-"
    figure = row["contenders"][name][phase]
    few = isinstance(figure, dict) and figure["repetitions"] < 5
    return f"{value:.2f}{'*' if few else ''}"


def _absolute(figure: Any, unit: str) -> str:
    scale = {"ms": 1e3, "MiB": 2**-20}[unit]
    if figure is None:
        return "-"
    if not isinstance(figure, dict):
        return f"{figure * scale:.2f}"
    low, middle, high = (f"{figure[key] * scale:.3g}" for key in ("q1", "median", "q3"))
    return f"{middle} ({low}..{high})"


def optimizer_table(result_rows: Sequence[dict[str, Any]]) -> str:
    """One optimizer a row: its step in milliseconds, and as a ratio to that of `torch.optim.Muon`."""
    body = []
    for name in result_rows[0]["contenders"]:
        cells = []
        for row in result_rows:
            value = ratio(row, name, "torch-muon")
            cells += [_absolute(row["contenders"][name]["total"], "ms"), "-" if value is None else f"{value:.2f}"]
        body.append([name, *cells])
    heads = [head for row in result_rows for head in (f"r = {row['case']['rank']}, ms", "ratio")]
    return table(["optimizer", *heads], body)


def launch_table(result_rows: Sequence[dict[str, Any]]) -> str:
    """One contender a row: how many operations each phase launches, and the time of a step and of an inference."""
    body = []
    for row in result_rows:
        for name, figure in row["contenders"].items():
            counts = [str(figure["launches"][phase]) for phase in ("forward", "backward", "inference")]
            body.append([name, *counts, _absolute(figure["total"], "ms"), _absolute(figure["inference"], "ms")])
    return table(["", "forward", "backward", "at inference", "forward + backward, ms", "inference, ms"], body)


def decoding_table(result_rows: Sequence[dict[str, Any]]) -> str:
    """The bare model's time for a token, and everyone else's as a ratio to it, one case a row."""
    names = [name for name in result_rows[0]["contenders"] if name != "frozen"]
    body = []
    for row in result_rows:
        ratios = [_cell(ratio(row, name, "frozen"), row, name, "total") for name in names]
        body.append([describe(row["case"]), _absolute(row["contenders"]["frozen"]["total"], "ms"), *ratios])
    return table(["case", "no adapter, ms", *names], body)


def loss_table(result_rows: Sequence[dict[str, Any]]) -> str:
    """A training step with the loss whole and in chunks, one case a row."""
    body = []
    for row in result_rows:
        found = [row["contenders"][how] for how in ("whole", "chunked")]
        times, peaks = [_absolute(f["total"], "ms") for f in found], [_absolute(f["peak"], "MiB") for f in found]
        body.append([describe(row["case"]), *times, *peaks])
    return table(["case", "whole, ms", "in chunks, ms", "whole, MiB", "in chunks, MiB"], body)


def left_out(result_rows: Sequence[dict[str, Any]]) -> list[str]:
    """Why contenders are missing, one line for each reason."""
    lines = [
        f"- {name}, {describe(row['case'])}: {figure['skipped']}"
        for row in result_rows
        for name, figure in row["contenders"].items()
        if "skipped" in figure
    ]
    return list(dict.fromkeys(lines))


def disk_tables(results: Results) -> str:
    """Save, load and export of small adapters, then the large export."""
    parts = []
    for row in rows(results, "disk"):
        if "contenders" in row:
            actions = ("save", "load", "export")
            body = [
                [name, *(_absolute(figure.get(a), "ms") for a in actions)]
                for name, figure in row["contenders"].items()
            ]
            parts.append(table(["MiniLM, attention, r = 8, ms", *actions], body))
            continue
        parts.append(_large_export(row["case"], {key: value["median"] for key, value in row["export"].items()}))
    return "\n\n".join(parts)


def _large_export(case: dict[str, Any], export: dict[str, float]) -> str:
    mib = {key: f"{value / 2**20:.4g} MiB" for key, value in export.items() if "peak" in key}
    return (
        f"7B-shaped: {case['layers']} layers of {case['d']} x {case['d']} q and v in {case['dtype']}, "
        f"r = {case['rank']}. Reading the weights: {export['read_seconds']:.3g} s (page cache cold: "
        f"{export['read_cold_seconds']:.3g} s), peak "
        f"+{mib['read_cold_peak']}. Export: {export['export_seconds']:.3g} s (cold: "
        f"{export['export_cold_seconds']:.3g} s), peak +{mib['export_cold_peak']}, or "
        f"+{mib['export_peak_of_one_layer']} for one layer alone; one weight has "
        f"{case['weight_bytes'] / 2**20:.3g} MiB. Largest residual: {export['residual']:.1e}."
    )


def growth_table(results: Results) -> str:
    """The fitted exponents."""
    body = []
    for row in rows(results, "growth"):
        case, exponents = row["case"], row["exponents"]
        fixed = ", ".join(
            f"{name} = {case[key]}" for name, key in (("d", "d"), ("r", "rank"), ("n", "rows")) if case[key]
        )
        tail = ", ".join(str(point["value"]) for point in row["points"][-3:])
        slopes = ["-" if slope is None else f"{slope:.2f}" for slope in exponents.values()]
        body.append([f"{case['axis']} ({fixed})", tail, *slopes])
    names = list(rows(results, "growth")[0]["exponents"])
    return table(["axis", "fitted to", *names], body)


def provenance(result: Result) -> str:
    """Machine, versions and date of a section, in a line or two."""
    machine, versions, settings = result["machine"], result["versions"], result["settings"]
    quick = "**A quick run, only to show that it works: not figures to quote.** " if settings["quick"] else ""
    gpu = f"{machine['gpu']}; " if "gpu" in machine else ""
    packages = ", ".join(f"{name} {number}" for name, number in versions.items())
    return (
        f"{quick}{gpu}{machine['cpu']}, {machine['threads']} of {machine['cores']} cores used, "
        f"{machine['memory_gib']} GiB, {machine['system']}, load at the start {machine['load_at_start']}; "
        f"{packages}; {result['date']}, {result['seconds']:.0f} s."
    )
