"""The page: one HTML file with everything in it, which asks nothing of the network."""

from __future__ import annotations

import base64
import functools
import gzip
import importlib.util
import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from isotune.checkpoint.files import write_atomically
from isotune.errors import IsotuneError
from isotune.report import words
from isotune.report.data import Collected, collect
from isotune.report.diagnosing import add_diagnoses, note_undiagnosed
from isotune.report.sections import sections
from isotune.report.verdict import Verdict, judge
from isotune.version import __version__


def build(
    paths: Sequence[str | Path],
    output: str | Path = "report.html",
    base: str | Path | None = None,
    diagnose: bool = True,
    most: int = 12,
    progress: bool = True,
) -> list[Verdict]:
    """Write a report on comparisons, runs, adapters and models, in any mix, as one HTML page.

    Args:
        paths: Their folders.
        output: The file to write.
        base: The base model, where adapters do not say it or it has moved.
        diagnose: Whether to measure what the adaptations did to the weights, which reads them all.
        most: The largest number of models to diagnose.
        progress: Whether to show a progress bar, on standard error where that is a terminal.

    Returns:
        The verdict on each comparison, then on the runs, then on the adapters and models.

    Raises:
        IsotuneError: A folder that is missing, empty, damaged or unfinished, an output that cannot be written, or
            plotly is not installed.
    """
    require_plotly()
    output = Path(output)
    if output.is_dir():
        raise IsotuneError(f"{output} is a folder; name a file to write, such as {output / 'report.html'}")
    collected = collect(paths)
    if diagnose:
        add_diagnoses(collected, base, most, progress=progress)
    else:
        note_undiagnosed(collected)
    verdicts = judge(collected)
    write_page(render(collected, verdicts), output)
    return verdicts


def write_page(page: str, output: Path) -> None:
    """Write the file in one step. Raises IsotuneError where it cannot be written."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise IsotuneError(f"{output} cannot be written: {error.strerror}") from None
    write_atomically(output, page)


def has_plotly() -> bool:
    """Whether reports can be written."""
    return importlib.util.find_spec("plotly") is not None


def require_plotly() -> None:
    """Raise IsotuneError where plotly is not installed."""
    if not has_plotly():
        raise IsotuneError("a report's figures need plotly, which is not installed: pip install 'isotune[report]'")


def render(collected: Collected, verdicts: Sequence[Verdict], when: datetime | None = None) -> str:
    """The page's text."""
    import jinja2

    parts = sections(collected)
    plots = {f"{section.key}/{figure.key}": figure.plots for section in parts for figure in section.figures}
    template = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    now = when or datetime.now(UTC)
    return template.from_string(_own("page.html.jinja")).render(
        title=_title(collected),
        verdicts=verdicts,
        notes=[words.sentence(note) for note in collected.notes],
        sections=parts,
        css=_own("page.css"),
        js=_own("page.js"),
        plots=_embedded(plots),
        data=_embedded(_data(collected, verdicts)),
        plotly=_plotly() if plots else "",
        version=__version__,
        date=now.strftime("%Y-%m-%d %H:%M UTC"),
    )


def _title(collected: Collected) -> str:
    names = [one.name for one in collected.subjects]
    kinds = [
        (collected.comparisons, "Comparison"),
        (collected.runs, "Run" if len(collected.runs) == 1 else "Runs"),
        (collected.weights, "Adapter" if len(collected.weights) == 1 else "Adapters"),
    ]
    kind = next((word for found, word in kinds if found), "Report")
    return f"{kind}: {', '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _data(collected: Collected, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The machine-readable copy: all but the curves and spectra, which the figures hold."""
    heavy = {"change_values", "weight_values", "adapted_values", "similarity", "variation", "angles"}
    return {
        "isotune": __version__,
        "verdicts": [verdict.as_dict() for verdict in verdicts],
        "comparisons": [
            {
                "name": one.name,
                "summary": one.summary.model_dump(),
                "units": [unit.model_dump(exclude={"curve"}) for unit in one.units],
            }
            for one in collected.comparisons
        ],
        "runs": [{"name": run.name, "metrics": run.metrics, "recipe": run.recipe} for run in collected.runs],
        "adapters": [
            {"name": one.name, "kind": one.kind, "merge": one.merge and one.merge.model_dump(mode="json")}
            for one in collected.weights
        ],
        "diagnoses": [
            {
                **{k: v for k, v in one.found.items() if k not in ("sites", "path")},
                "label": one.label,
                "sites": [{k: v for k, v in site.items() if k not in heavy} for site in one.found["sites"]],
            }
            for one in collected.diagnoses
        ],
        "notes": collected.notes,
    }


def _embedded(value: Any) -> Any:
    """JSON that may stand inside a script element; what is not finite becomes null, which JSON has."""
    from markupsafe import Markup

    text = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=str)
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(own) for key, own in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _own(name: str) -> Any:
    """One of the page's parts in this package, as it is."""
    from markupsafe import Markup

    return Markup((files("isotune.report") / "assets" / name).read_text(encoding="utf-8"))


@functools.cache
def _plotly() -> Any:
    """plotly.js, compressed: the browser unpacks it in a tenth of a second, and the page is 3 MB smaller."""
    from markupsafe import Markup

    spec = importlib.util.find_spec("plotly")
    assert spec is not None
    assert spec.origin is not None
    code = (Path(spec.origin).parent / "package_data" / "plotly.min.js").read_bytes()
    return Markup(base64.b64encode(gzip.compress(code, 9, mtime=0)).decode())
