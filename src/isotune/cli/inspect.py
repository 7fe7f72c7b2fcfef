"""`isotune inspect` and `isotune mitigate`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isotune.cli.output import print_json, print_table
from isotune.errors import OptionError

if TYPE_CHECKING:
    from isotune.diagnostics.diagnosis import Diagnosis, SiteDiagnosis
    from isotune.diagnostics.norm_bound import AttentionBound
    from isotune.diagnostics.overlap import Overlap

Flag = typer.Option
AsJson = Annotated[bool, Flag("--json", help="Only the result, as JSON, on standard output.")]
Base = Annotated[str | None, Flag(help="The model it started from, if it does not say, or that has moved.")]
K = Annotated[int, Flag("--k", help="How many leading singular vectors of each weight to look at.")]
Threshold = Annotated[float, Flag(help="Below this cosine a singular vector is an intruder.")]
SideFlag = Annotated[str, Flag(help="Whose singular vectors: left, right, or both.")]

_INSPECT_HELP = """Show what an adaptation did to each weight: an adapter, a run, or a fully trained model.

Size, rank and share of the change, angles of rotations, singular values, intruder dimensions, spectral variation; of
several adaptations, how far their subspaces overlap. docs/diagnostics.md says how to read it.

Examples:

  isotune inspect my-run

  isotune inspect lora-run hra-run full-run --only query --side both

  isotune inspect ./tuned-model --base ./model --json
"""

_MITIGATE_HELP = """Write an adapter in which the intruder dimensions of another are scaled down.

The result is a LoRA. Evaluate it on the task, and on what was forgotten, before relying on it.

Example:

  isotune mitigate my-run --factor 0.75 --output my-run-mitigated
"""


def inspect_command(
    sources: Annotated[list[str], typer.Argument(help="Folders of adapters, of runs, or of fully trained models.")],
    base: Base = None,
    k: K = 10,
    threshold: Threshold = 0.5,
    side: SideFlag = "left",
    only: Annotated[str | None, Flag(help="A regular expression for the paths of the layers to measure.")] = None,
    fast: Annotated[bool, Flag("--fast", help="Without decomposing the base's weights: sizes and angles.")] = False,
    norms: Annotated[bool, Flag("--norms", help="Also bound what enters attention, by the weights.")] = False,
    length: Annotated[int | None, Flag(help="--norms: tokens in a sequence; by default the model's most.")] = None,
    device: Annotated[str, Flag(help="Where to compute, such as cuda.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    from isotune.diagnostics import attention_bounds, survey

    if length is not None and not norms:
        raise OptionError("--length goes with --norms")
    found = survey(
        sources, base, k=k, threshold=threshold, side=side, spectral=not fast, only=only, device=device
    )  # fmt: skip
    bounds = {str(s): attention_bounds(s, base, length=length) for s in sources} if norms else {}
    if as_json:
        one: dict[str, Any] = found.diagnoses[0].to_dict() if len(sources) == 1 else found.to_dict()
        more = {"norm_bounds": bounds[sources[0]] if len(sources) == 1 else bounds} if norms else {}
        print_json({**one, **more})
        return
    _show_totals(found.diagnoses)
    for diagnosis in found.diagnoses:
        _show_sites(diagnosis)
    if found.overlaps:
        _show_overlaps(found.overlaps)
    for path, own in bounds.items():
        _show_bounds(path, own)


def _show_totals(diagnoses: Sequence[Diagnosis]) -> None:
    notes = [f"{d.path}: {_notes(d)}" for d in diagnoses]
    print_table(
        "all layers together",
        ["adaptation", "method", "layers", "parameters", "|W' - W| / |W|", "intruders", "layers with some"],
        [
            [d.path, d.method, str(d.total.sites), f"{d.total.trainable:,}", _figure(d.total.relative_change, 4),
             _count(d.total.intruders), _count(d.total.sites_with_intruders)]
            for d in diagnoses
        ],
        "\n".join(notes),
    )  # fmt: skip


def _notes(diagnosis: Diagnosis) -> str:
    without = any(site.change_norm is None for site in diagnosis.sites)
    return "; ".join(
        [
            f"base: {diagnosis.base_model or 'not recorded'}",
            *([f"trained in full: {', '.join(diagnosis.trained_modules)}"] if diagnosis.trained_modules else []),
            *([f"{len(names)} left out, {why}" for why, names in diagnosis.left_out.items()]),
            *(["the base is not at hand: most figures need --base"] if without else []),
        ]
    )


def _show_sites(diagnosis: Diagnosis) -> None:
    turns = any(site.orthogonality_error is not None for site in diagnosis.sites)
    print_table(
        f"{diagnosis.path}: the change of each layer",
        ["layer", "kind", "W", "parameters", "|W' - W| / |W|", "share", "rank of W' - W", "effective",
         *(["|RᵀR - I|", "angles"] if turns else [])],
        [
            [
                site.site, site.kind, f"{site.out_features} x {site.in_features}", f"{site.trainable:,}",
                _figure(site.change_norm, 4), _percent(site.share), _count(site.change_rank),
                _figure(site.effective_rank, 1), *(_turning(site) if turns else []),
            ]
            for site in diagnosis.sites
        ],
        "share: of the squared change of all layers; effective: how many directions carry it"
        + ("; angles: how many, and the largest" if turns else ""),
    )  # fmt: skip
    spectral = [site for site in diagnosis.sites if site.intruders is not None]
    if not spectral:
        return
    settings = diagnosis.settings
    print_table(
        f"{diagnosis.path}: the {settings.k} leading singular triplets of each layer",
        ["layer", "σ₁ of W", "of W'", "of W' - W", "intruders", "cosine", "window", "values", "vectors", "matched",
         "space"],
        [_spectral_row(site) for site in spectral],
        f"intruders: leading singular vectors of W' ({settings.side}) with a cosine below {settings.threshold:g} to "
        "all of W's; cosine: the smallest; window: the smallest by neighbourhoods of W's singular values; values to "
        "space: how far they moved, 0 where not at all, values relative to W's. A count is no verdict",
    )  # fmt: skip


def _spectral_row(site: SiteDiagnosis) -> list[str]:
    first = [
        max(values or [], default=None) for values in (site.weight_values, site.adapted_values, site.change_values)
    ]
    found, moved = site.intruders or [], site.variation
    return [
        site.site,
        *(_figure(value, 3) for value in first),
        f"{len(found)}" + (f" ({' '.join(map(str, found))})" if found else ""),
        *(_figure(min(values, default=None), 3) for values in (site.similarity or [], site.window_similarity or [])),
        *(
            _figure(value, 4)
            for value in ((moved.relative, moved.vectors, moved.matched, moved.distance) if moved else ())
        ),
    ]


def _show_overlaps(overlaps: Iterable[Overlap]) -> None:
    print_table(
        "overlap of the changes, mean over the layers that both have",
        ["adaptations", "layers", "columns", "by chance", "rows", "by chance"],
        [
            [" / ".join(o.models), str(len(o.sites)), _figure(o.columns, 3), _figure(o.column_chance, 3),
             _figure(o.rows, 3), _figure(o.row_chance, 3)]
            for o in overlaps
        ],
        "columns: the outputs that they write; rows: the inputs that they read; 1 where one space holds the other",
    )  # fmt: skip


def _show_bounds(path: str, bounds: Sequence[AttentionBound]) -> None:
    roles = list(dict.fromkeys(role for bound in bounds for role in bound.after))
    print_table(
        f"{path}: what enters attention can be no larger than",
        ["attention", "|x|", *(f"{role}, before" for role in roles), *(f"{role}, after" for role in roles),
         "rho, before", "rho, after"],
        [
            [b.layer, _figure(b.input_norm, 1), *(_figure(b.before.get(role), 1) for role in roles),
             *(_figure(b.after.get(role), 1) for role in roles), _figure(b.rho_before, 2), _figure(b.rho_after, 2)]
            for b in bounds
        ],
        "|x|: of the normalisation in front; rho: the larger of query and key over √(ln L). Orders without "
        "constants: read the growth, not the size",
    )  # fmt: skip


def _figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _turning(site: SiteDiagnosis) -> list[str]:
    error = "-" if site.orthogonality_error is None else f"{site.orthogonality_error:.1e}"
    return [error, f"{len(site.angles)}, {math.degrees(max(site.angles)):.1f}°" if site.angles else "-"]


def mitigate_command(
    adapter: Annotated[Path, typer.Argument(help="An adapter's folder, isotune's or PEFT's, or a run's.")],
    output: Annotated[Path, Flag("--output", "--out", help="Folder to write: new, or an older adapter.")],
    factor: Annotated[float, Flag(help="What intruders are multiplied by: 0 takes them out, 1 leaves them.")] = 0.75,
    rank: Annotated[str, Flag(help="Of the result: exact, same as before, or a number.")] = "exact",
    base: Base = None,
    k: K = 10,
    threshold: Threshold = 0.5,
    side: SideFlag = "left",
    as_json: AsJson = False,
) -> None:
    from isotune.diagnostics import mitigate

    wanted: Any = int(rank) if rank.isdecimal() else rank
    done = mitigate(
        adapter, output, factor, base, k=k, threshold=threshold, side=side, rank=wanted
    )  # fmt: skip
    if as_json:
        print_json(done)
        return
    count = sum(map(len, done.intruders.values()))
    print_table(
        f"{done.path}: {count} intruders times {done.factor:g}, at {len(done.intruders)} of {len(done.ranks)} layers",
        ["layer", "intruders", "rank", "cut off"],
        [
            [path, " ".join(map(str, done.intruders.get(path, []))) or "-", str(own), f"{done.errors[path]:.1e}"]
            for path, own in done.ranks.items()
        ],
        f"the change moved by {done.moved:.1%} of its norm; its rank cut off {done.error:.1e} of the new one",
    )


def register(app: typer.Typer) -> None:
    """Add the two commands to the application."""
    app.command("inspect", help=_INSPECT_HELP)(inspect_command)
    app.command("mitigate", help=_MITIGATE_HELP)(mitigate_command)
