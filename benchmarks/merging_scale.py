"""`python -m benchmarks.merging_scale`: what merging many adapters of a large model costs, rule by rule.

Random adapters on the query and value projections of a 7B shape, written as `isotune.save` writes them, then merged
from files to files, each rule in a process of its own. Finished rules are kept: stop it, and start it again to go on.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.__main__ import rounded
from benchmarks.machine import machine, now, versions
from benchmarks.memory import run_child
from benchmarks.tables import table
from isotune.adapters.contract import Adapter
from isotune.adapters.low_rank.lora import LoRA
from isotune.adapters.orthogonal.hra import HRA
from isotune.adapters.settings import Settings
from isotune.checkpoint.base_record import BaseRecord
from isotune.checkpoint.files import CONFIG
from isotune.checkpoint.save import write_parts
from isotune.linalg.householder import unit_columns
from isotune.merging.registry import rule_class, rules
from isotune.sites import Site, require_site, stored_layer

RESULTS = Path(__file__).parent / "results" / "merging_scale.json"
PAGE = Path(__file__).parent.parent / "docs" / "merging-scale.md"
PROMISED = {"seconds": 60.0, "bytes": 2e9}
"""What a merge may take, at most, in the rules on changes, rotations and adapters."""
SIZE = {"layers": 32, "models": 20, "rank": 16, "width": 4096}
"""Where that is promised."""
GROUPS = {
    "changes": "Rules on changes: LoRA",
    "adapters": "Compression: LoRA",
    "rotations": "Rules on rotations: HRA",
    "entries": "Rules on single entries: LoRA",
}

OPENING = """# What merging costs

Written by `python -m benchmarks.merging_scale`, from `benchmarks/results/merging_scale.json`; do not edit.

{models} adapters of rank {rank} on the query and value projections of {layers} layers of {width} x {width} ({sites}
layers adapted in all, as in a model of {billions}), random, stored in {dtype}, {megabytes:.0f} MB each. Every rule
with its default options, from files to files (with the checks of what is read, and the wait until what is written is
on the disk), in a process of its own on {threads} threads. Seconds leave out the start of Python; those of the
processor are summed over the threads. Peak memory is all that the process has resident, with PyTorch and the pages of
files that it has mapped; beside it what the merge added. MB are 10^6 bytes.

{promise}

{where}
"""


def candidates() -> dict[str, str]:
    """The rules that merge adapters without further data, and the kind of each."""
    found = {row.name: row.merges for row in rules() if row.merges in GROUPS and not row.needs}
    return {name: kind for kind in GROUPS for name, of in found.items() if of == kind}


def main(arguments: list[str] | None = None) -> None:
    """Measure what has not been measured, and write the page."""
    given = parsed(arguments)
    result = rounded(measure(given))
    for file, text in ((given.results, json.dumps(result, indent=1) + "\n"), (given.page, page(result))):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser("benchmarks.merging_scale", description="What merging many adapters costs.")
    parser.add_argument("--layers", type=int, default=SIZE["layers"], help="layers: %(default)s")
    parser.add_argument("--models", type=int, default=SIZE["models"], help="adapters, at least 2: %(default)s")
    parser.add_argument("--rank", type=int, default=SIZE["rank"], help="their rank, even: %(default)s")
    parser.add_argument("--width", type=int, default=SIZE["width"], help="rows and columns of a layer: %(default)s")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="as stored: %(default)s")
    parser.add_argument("--rules", nargs="+", choices=candidates(), default=list(candidates()), metavar="RULE")
    parser.add_argument("--threads", type=int, default=2, help="threads: %(default)s")
    parser.add_argument("--again", action="store_true", help="measure finished rules again")
    parser.add_argument("--folder", type=Path, default=Path("runs/merging-scale"), help="adapters: %(default)s")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the figures: %(default)s")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page: %(default)s")
    return parser.parse_args(arguments)


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """All figures of the page."""
    settings = {name: getattr(given, name) for name in ("layers", "models", "rank", "width", "dtype", "threads")}
    folder = given.folder / "-".join(map(str, settings.values()))
    torch.set_num_threads(given.threads)
    about = {"date": now(), "machine": machine("cpu"), "versions": versions(), "settings": settings}
    kinds, found = candidates(), {}
    for rule in given.rules:
        method: Settings = HRA(rank=given.rank) if kinds[rule] == "rotations" else LoRA(rank=given.rank)
        adapters = [
            write_random(folder / method.name / f"{number:02}", method, given, number)
            for number in range(rule_class(rule).models[1] or given.models)
        ]
        file = folder / f"{rule}.json"
        if given.again or not file.is_file():
            print(rule, file=sys.stderr, flush=True)
            asked = [rule, "{}", str(folder / "merged"), str(given.threads), *map(str, adapters)]
            file.write_text(json.dumps({"kind": kinds[rule], **run_child("benchmarks.one_merge", asked)}))
        found[rule] = json.loads(file.read_text())
    return about | {"rules": found}


def write_random(folder: Path, settings: Settings, given: argparse.Namespace, seed: int) -> Path:
    """An adapter of random values, as training leaves them, in `folder`; kept where it is there."""
    if not (folder / CONFIG).is_file():
        generator = torch.Generator().manual_seed(seed)
        parts: dict[str, tuple[Site, Settings, Adapter]] = {}
        for layer in range(given.layers):
            for name in ("q_proj", "v_proj"):
                path = f"model.layers.{layer}.self_attn.{name}"
                bare = stored_layer("linear", torch.empty(given.width, given.width, device="meta"))
                site = require_site(bare, path)
                adapter = random_adapter(settings, site, generator)
                parts[path] = (site, settings, adapter.to(getattr(torch, given.dtype)))
        write_parts(folder, parts, {}, BaseRecord())
    return folder


def random_adapter(settings: Settings, site: Site, generator: torch.Generator) -> Adapter:
    """An adapter a few steps from its start: a LoRA's B is not zero, and an HRA's pairs do not cancel."""
    adapter = settings.build(site, generator)
    with torch.no_grad():
        for tensor in adapter.parameters():
            moved = torch.randn(tensor.shape, generator=generator) * 0.2 / tensor.shape[0] ** 0.5
            tensor.copy_(unit_columns(tensor + moved) if isinstance(settings, HRA) else tensor + moved)
    return adapter


def kept_promise(row: dict[str, Any]) -> bool:
    """Whether a rule took no more than what is promised of all but those on single entries."""
    return row["seconds"] <= PROMISED["seconds"] and row["peak_bytes"] <= PROMISED["bytes"]


def page(result: dict[str, Any]) -> str:
    """The page as Markdown: one table for each kind of rule."""
    settings, found = result["settings"], result["rules"]
    first = next(iter(found.values()))
    parts = [
        OPENING.format(
            **settings,
            sites=2 * settings["layers"],
            billions="7 billion parameters" if all(settings[key] == SIZE[key] for key in SIZE) else "smaller size",
            megabytes=first["read_bytes"] / first["models"] / 1e6,
            promise=_promise(settings, found),
            where=f"{result['machine']['cpu']}, {result['machine']['cores']} cores, load at the start "
            f"{result['machine']['load_at_start']:g}; torch {result['versions']['torch']}; commit "
            f"{result['versions'].get('commit', 'unknown')}; {result['date']}.",
        )
    ]
    header = [
        "rule",
        "adapters",
        "seconds",
        "of the processor",
        "peak, MB",
        "added, MB",
        "rank",
        "error",
        "MB written",
    ]
    for kind, title in GROUPS.items():
        if body := [_row(name, row) for name, row in found.items() if row["kind"] == kind]:
            parts.append(f"## {title}\n\n{table(header, body)}\n")
    return "\n".join(parts)


def _promise(settings: dict[str, Any], found: dict[str, dict[str, Any]]) -> str:
    if any(settings[key] != SIZE[key] for key in SIZE):
        return "This is not the size at which anything is promised."
    missed = [name for name, row in found.items() if row["kind"] != "entries" and not kept_promise(row)]
    verdict = f"missed by {', '.join(missed)}" if missed else "kept by all of them"
    unknown = [name for name, kind in candidates().items() if kind != "entries" and name not in found]
    return (
        f"Promised of every rule but those on single entries: at most {PROMISED['seconds']:g} seconds and "
        f"{PROMISED['bytes'] / 1e6:g} MB in all; {verdict}."
        + (f" Not measured, and so not among them: {', '.join(unknown)}." if unknown else "")
    )


def _row(name: str, row: dict[str, Any]) -> list[str]:
    return [
        name,
        str(row["models"]),
        f"{row['seconds']:.1f}",
        f"{row['cpu_seconds']:.1f}",
        f"{row['peak_bytes'] / 1e6:.0f}",
        f"{row['added_bytes'] / 1e6:.0f}",
        "" if row["rank"] is None else str(row["rank"]),
        f"{row['error']:.2f}" if row["error"] > 1e-3 else "0",
        f"{row['written_bytes'] / 1e6:.0f}",
    ]


if __name__ == "__main__":
    main()
