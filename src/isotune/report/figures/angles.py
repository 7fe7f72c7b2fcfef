"""Histograms of the angles by which rotations turn, over all layers."""

from __future__ import annotations

import math
from collections.abc import Sequence

from isotune.report import words
from isotune.report.data import Diagnosed
from isotune.report.figures.figure import Figure, Plot, layout
from isotune.report.tables import TableCell, simple

BINS = 36


def angle_histograms(diagnoses: Sequence[Diagnosed]) -> list[Figure]:
    """One for each diagnosis of rotations; the axes are the same in all."""
    turned = [(d, found) for d in diagnoses if (found := angles(d))]
    most = max((max(histogram(found)) for _, found in turned), default=0)
    figures = []
    for number, (diagnosis, found) in enumerate(turned):
        counts = histogram(found)
        width = 180 / BINS
        trace: Plot = {
            "type": "bar", "x": [width * (i + 0.5) for i in range(BINS)], "y": counts, "width": width,
            "marker": {"color": "@1", "line": {"width": 0}},
            "hovertemplate": "%{y} angles around %{x}°<extra></extra>",
        }  # fmt: skip
        plot = {
            "data": [trace],
            "layout": layout(
                "rotation angle (degrees)", "count", 320, showlegend=False, bargap=0,
                xaxis={"range": [0, 180], "dtick": 30}, yaxis={"range": [0, 1.08 * most]},
            ),
        }  # fmt: skip
        low, middle, high = (found[round(q * (len(found) - 1))] for q in (0, 0.5, 1))
        table = simple(
            f"Rotation angles of {diagnosis.label}",
            ["", "degrees"],
            [[n, TableCell(f"{v:.2f}", v)] for n, v in (("least", low), ("median", middle), ("largest", high))],
        )
        title = f"{diagnosis.label}: {words.counted(len(found), 'angle')}"
        figures.append(Figure(f"angles-{number}", title, {"": plot}, table))
    return figures


def angles(diagnosis: Diagnosed) -> list[float]:
    """All layers' angles in degrees, rising."""
    found = [angle for site in diagnosis.found["sites"] for angle in site.get("angles") or ()]
    return sorted(math.degrees(abs(angle)) for angle in found)


def histogram(degrees: Sequence[float]) -> list[int]:
    """Counts in `BINS` bins between 0 and 180 degrees."""
    counts = [0] * BINS
    for angle in degrees:
        counts[min(BINS - 1, int(angle * BINS / 180))] += 1
    return counts
