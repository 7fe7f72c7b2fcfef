"""Spectra of a layer before and after, intruder dimensions marked, and of the change; the models side by side."""

from __future__ import annotations

from collections.abc import Sequence

from isotune.report import words
from isotune.report.data import Diagnosed, Json
from isotune.report.figures.figure import Figure, Plot, layout, rounded
from isotune.report.figures.lines import log_axis
from isotune.report.tables import Table, TableCell, simple

MOST_SITES = 48


def spectra(diagnoses: Sequence[Diagnosed]) -> list[Figure]:
    """One figure for each diagnosis that saw the base, with a choice of layers: those that changed the most."""
    known = [d for d in diagnoses if any(site.get("adapted_values") for site in d.found["sites"])]
    sites = shown_sites(known)
    first = _most_invaded(known, sites)
    ranges = {site: _range(known, site) for site in sites}
    figures = []
    for number, diagnosis in enumerate(known):
        at = {site["site"]: site for site in diagnosis.found["sites"] if site.get("adapted_values")}
        threshold = (diagnosis.found.get("settings") or {}).get("threshold")
        plots = {site: _plot(at[site], ranges[site]) for site in sites if site in at}
        if plots:
            table = _table(diagnosis, [at[site] for site in plots], threshold)
            figures.append(Figure(f"spectrum-{number}", diagnosis.label, plots, table, "Layer", first))
    return figures


def shown_sites(diagnoses: Sequence[Diagnosed]) -> list[str]:
    """The layers to show: all, or of many those with intruders and the largest change, in the model's order."""
    weight: dict[str, float] = {}
    for diagnosis in diagnoses:
        for site in diagnosis.found["sites"]:
            if site.get("adapted_values"):
                own = len(site.get("intruders") or ()) + (site.get("share") or 0.0)
                weight[site["site"]] = max(weight.get(site["site"], 0.0), own)
    kept = set(sorted(weight, key=lambda site: -weight[site])[:MOST_SITES])
    return [site for site in weight if site in kept]


def _most_invaded(diagnoses: Sequence[Diagnosed], sites: Sequence[str]) -> str:
    """The layer to be shown first: of those that all models have, the one with the most intruders."""
    counts = dict.fromkeys(sites, 0)
    for diagnosis in diagnoses:
        found = {site["site"]: len(site.get("intruders") or ()) for site in diagnosis.found["sites"]}
        common = {site: count + found[site] for site, count in counts.items() if site in found}
        counts = common or counts
    return max(counts, key=lambda site: counts[site], default="")


def _range(diagnoses: Sequence[Diagnosed], path: str) -> list[float]:
    """The least and the largest value of a layer's spectra in all models, which are drawn on one scale."""
    sites = [site for diagnosis in diagnoses for site in diagnosis.found["sites"] if site["site"] == path]
    keys = ("weight_values", "adapted_values", "change_values")
    found = [value for site in sites for key in keys for value in _above_rounding(site.get(key) or ())]
    return [min(found), max(found)] if found else [1.0, 1.0]


def _above_rounding(values: Sequence[float]) -> list[float]:
    """A logarithmic axis has no zero; what is zero to fp32's precision would only stretch it."""
    return [value for value in values if value > 1e-6 * max(values)]


def _plot(site: Json, limits: Sequence[float]) -> Plot:
    before, after, change = (site.get(key) or [] for key in ("weight_values", "adapted_values", "change_values"))
    similarity = site.get("similarity") or []
    marked = [j for j in site.get("intruders") or [] if 0 < j <= len(after)]
    data = [
        _line("W, before", before, "@muted", "circle-open", "dot"),
        _line("W′, after", after, "@1", "circle", "solid"),
        _line("the change, W′ − W", change, "@3", "diamond", "dash"),
    ]
    data.append(
        {
            "type": "scatter", "mode": "markers", "name": "intruder dimension", "x": marked,
            "y": [rounded(after[j - 1], 4) for j in marked],
            "marker": {"symbol": "circle-open", "size": 18, "color": "@2", "line": {"width": 2.5}},
            "text": [_likeness(similarity, j) for j in marked], "showlegend": True,
            "hovertemplate": "intruder %{x}%{text}<extra></extra>",
        }
    )  # fmt: skip
    axes: Plot = {
        "yaxis": log_axis(limits),
        "xaxis": {"rangemode": "tozero"},
    }
    return {"data": [line for line in data if line["x"]], "layout": layout("index", "singular value", 380, **axes)}


def _line(name: str, values: Sequence[float], colour: str, symbol: str, dash: str) -> Plot:
    kept = list(enumerate(_above_rounding(values), 1))
    return {
        "type": "scatter", "mode": "lines+markers", "name": name, "x": [j for j, _ in kept],
        "y": [rounded(value, 4) for _, value in kept],
        "line": {"color": colour, "dash": dash, "width": 1.5},
        "marker": {"color": colour, "symbol": symbol, "size": 6},
        "hovertemplate": f"{name}: %{{y}}, number %{{x}}<extra></extra>",
    }  # fmt: skip


def _likeness(similarity: Sequence[float], j: int) -> str:
    return f", similarity to the base's nearest {similarity[j - 1]:.2f}" if j <= len(similarity) else ""


def _table(diagnosis: Diagnosed, sites: Sequence[Json], threshold: float | None) -> Table:
    below = f" (similarity below {threshold:g})" if threshold is not None else ""
    lines = []
    for site in sites:
        similarity = site.get("similarity") or []
        lines.append(
            [
                site["site"],
                _largest(site.get("weight_values")),
                _largest(site.get("adapted_values")),
                _largest(site.get("change_values")),
                TableCell(
                    ", ".join(map(str, site.get("intruders") or [])) or "none", len(site.get("intruders") or [])
                ),
                TableCell(words.number(min(similarity), 2) if similarity else "–", min(similarity, default=None)),
            ]
        )
    titles = [
        "layer",
        "largest of W",
        "largest of W′",
        "largest of the change",
        f"intruders{below}",
        "least similarity",
    ]
    return simple(f"Singular values, {diagnosis.label}", titles, lines)


def _largest(values: Sequence[float] | None) -> TableCell:
    return TableCell(words.number(values[0]), values[0]) if values else TableCell("–")
