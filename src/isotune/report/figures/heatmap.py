"""Per-layer heat maps of the change: layers down, kinds of modules across, the models side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from isotune.report import words
from isotune.report.data import Diagnosed
from isotune.report.figures.figure import Figure, Plot, layout, rounded
from isotune.report.tables import TableCell, simple

_MEASURES = [
    ("change_norm", "relative change", 100.0, "%"),
    ("share", "share of the whole change", 100.0, "%"),
    ("effective_rank", "effective rank of the change", 1.0, ""),
    ("intruders", "intruder dimensions", 1.0, ""),
]


def heat_maps(diagnoses: Sequence[Diagnosed]) -> list[Figure]:
    """One figure for each diagnosis; a measure has one colour scale in all of them."""
    most = {key: _most(diagnoses, key) for key, *_ in _MEASURES}
    figures = []
    for number, diagnosis in enumerate(diagnoses):
        plots = {
            f"{title}{f' ({unit})' if unit else ''}": _plot(diagnosis, key, times, unit, most[key])
            for key, title, times, unit in _MEASURES
            if most[key] is not None and any(value(site, key) is not None for site in diagnosis.found["sites"])
        }
        if plots:
            figures.append(Figure(f"heat-{number}", diagnosis.label, plots, site_table(diagnosis), "Measure"))
    return figures


def value(site: dict[str, Any], key: str) -> float | None:
    """A site's number on a measure; of intruders how many there are."""
    found = site.get(key)
    return len(found) if isinstance(found, list) else found


def place(path: str) -> tuple[int | None, str]:
    """The layer's number and the module in it: `encoder.layer.3.attention.query` is (3, "attention.query")."""
    parts = path.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdecimal()]
    if not numbers or numbers[0] == len(parts) - 1:
        return None, path
    return int(parts[numbers[0]]), ".".join(parts[numbers[0] + 1 :])


def _most(diagnoses: Sequence[Diagnosed], key: str) -> float | None:
    found = [v for d in diagnoses for site in d.found["sites"] if (v := value(site, key)) is not None]
    return max(found) if found else None


def _plot(diagnosis: Diagnosed, key: str, times: float, unit: str, most: float | None) -> Plot:
    sites = diagnosis.found["sites"]
    places = [place(site["site"]) for site in sites]
    kinds = list(dict.fromkeys(kind for _, kind in places))
    layers = sorted({layer for layer, _ in places}, key=lambda layer: (layer is None, layer))
    at = dict(zip(places, sites, strict=True))
    grid = [[_scaled(at.get((layer, kind)), key, times) for kind in kinds] for layer in layers]
    names = ["–" if layer is None else str(layer) for layer in layers]
    short = words.brief(kinds)
    trace: Plot = {
        "type": "heatmap", "z": grid, "x": short, "y": names, "zmin": 0, "zmax": rounded(times * (most or 0)) or 1,
        "colorscale": "@scale", "xgap": 1, "ygap": 1, "colorbar": {"thickness": 12, "ticksuffix": unit},
        "hovertemplate": f"layer %{{y}}, %{{x}}: %{{z}}{unit}<extra></extra>",
    }  # fmt: skip
    if len(grid) * len(kinds) <= 72:
        trace["texttemplate"] = "%{z:.3~g}"
    axes: Plot = {
        "xaxis": {"title": {"text": ""}, "type": "category", "automargin": True, "showgrid": False},
        "yaxis": {"type": "category", "autorange": "reversed", "automargin": True, "showgrid": False},
    }
    return {"data": [trace], "layout": layout("", "layer", max(200, 100 + 26 * len(layers)), **axes)}


def _scaled(site: dict[str, Any] | None, key: str, times: float) -> float | None:
    found = None if site is None else value(site, key)
    return None if found is None else rounded(times * found, 4)


def site_table(diagnosis: Diagnosed) -> Any:
    """Every layer with its measures."""
    titles = ["layer", "W", "trainable", "relative change", "share", "rank", "effective rank", "intruders"]
    return simple(
        f"Layers of {diagnosis.label}",
        [*titles, "distance from orthogonality"],
        [
            [
                site["site"],
                TableCell(f"{site.get('out_features')} × {site.get('in_features')}", site.get("out_features")),
                TableCell(words.number(site.get("trainable")), site.get("trainable")),
                TableCell(words.share(site.get("change_norm")), site.get("change_norm")),
                TableCell(words.share(site.get("share")), site.get("share")),
                TableCell(words.number(site.get("change_rank")), site.get("change_rank")),
                TableCell(words.number(site.get("effective_rank")), site.get("effective_rank")),
                TableCell(words.number(value(site, "intruders")), value(site, "intruders")),
                TableCell(words.number(site.get("orthogonality_error"), 2), site.get("orthogonality_error")),
            ]
            for site in diagnosis.found["sites"]
        ],
    )  # fmt: skip
