"""`python -m benchmarks.merging`: ten domains, ten adapters, one merged adapter, by every rule.

all-MiniLM-L6-v2 on CLINC150: for each of the ten domains an adapter and a head of its own (15 intents), trained
separately; then one adapter merged from the ten, measured on every domain with that domain's head.
Finished runs and merges are kept: stop it, and start it again to go on.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.__main__ import rounded
from benchmarks.machine import machine, now, versions
from benchmarks.memory import run_child
from benchmarks.reading import score
from benchmarks.tables import table
from isotune.checkpoint.base import MINILM
from isotune.checkpoint.files import STATISTICS
from isotune.intervals import Interval, half_width
from isotune.merging.adapters.merge import merge
from isotune.merging.reversible.adapters import compress_adapters, recover_adapter
from isotune.training.folder import RunFolder
from isotune.training.progress import Screen, quiet_libraries
from isotune.training.recipe import build_recipe
from isotune.training.run import train
from isotune.training.scores import Tasks
from isotune.training.statistics import collect_fisher

ROWS = Path(__file__).parent / "clinc150" / "rows.jsonl.gz"
DOCS = Path(__file__).parent.parent / "docs"
RANKS = (4, 16)
TEST_ROWS = 150
"""Test rows of each domain on which merged adapters, and the domain's own, are measured."""
VALIDATION_ROWS = 45
"""Validation rows of each domain on which the scale is chosen."""
EXAMPLES = 64
"""Rows of each domain on which the Fisher information is measured."""
SCALES = (0.1, 0.2, 0.4, 1.0)
"""Factors on the merged change that are tried on the validation rows."""


@dataclass(frozen=True)
class Contender:
    """One way from ten adapters to one."""

    rule: str
    method: str = "lora"
    options: dict[str, Any] = field(default_factory=dict)
    scales: tuple[float, ...] = SCALES
    fractions: bool = False
    """Whether a scale is every adapter's weight, which takes part of its rotation, and no factor on the result."""

    @property
    def title(self) -> str:
        """How the table calls it."""
        options = "".join(f", {name} {value}" for name, value in self.options.items())
        return f"{self.rule} of {self.method}{options}"


CHANGES = ("sum", "svd", "knots", "iso_c", "iso_cts", "tsv_m", "opcm")
ENTRIES = ("ties", "dare", "dare_ties", "magnitude", "breadcrumbs", "della", "fisher", "ota", "ffg")
CONTENDERS = (
    *(Contender(rule) for rule in (*CHANGES, *ENTRIES)),
    Contender("sum", "ortha"),
    Contender("sum", "hra"),
    Contender("compose", "hra", fractions=True),
    Contender("karcher", "hra", scales=(1.0,)),
    *(Contender("rmm", options={"basis": basis}) for basis in (2, 4, 8)),
)

OPENING = """# Ten adapters into one

Written by `python -m benchmarks.merging`, from `merging-compared.json`; do not edit.

all-MiniLM-L6-v2 on CLINC150 (CC BY 3.0): for each of {domains} domains an adapter on the query and value projections
and a head for its 15 intents, both from a random start, {per_intent} training rows an intent, epochs: {epochs},
trained apart from the others. Then the adapters are merged into one, and every domain is measured with the merged
adapter and its own head. The merged change is multiplied by one of {scales} (for compose, that part of each rotation
is taken), chosen on {validation_rows} validation rows a domain; accuracy is that on {test_rows} test rows a domain:
mean over the domains, with its 95 % t-interval over {seeds} seeds, and relative to the domains' own adapters. The
merged adapter has at most the ranks' sum as its rank; the error is what that cut off. Seconds, and memory beside what
the process held before, are those of one merge from files to files, measured apart.

Rule rmm merges nothing: every domain has its own adapter as it comes back, the rank is the number of basis models,
and the error the largest of a layer's change. The error of the factors that the singular values left out predict was
off by {predicted} at most.

{where}
"""


def main(arguments: list[str] | None = None) -> None:
    """Parse the options, run what has not been run, and write the page."""
    parser = argparse.ArgumentParser("benchmarks.merging", description="Merge ten adapters by every rule.")
    parser.add_argument("--output", type=Path, default=Path("runs/merged"), help="folder of the runs: %(default)s")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the page: %(default)s")
    parser.add_argument("--methods", nargs="+", default=["lora", "ortha", "hra"], help="adapters to train and merge")
    parser.add_argument("--rules", nargs="+", default=None, help="some rules only")
    parser.add_argument("--ranks", nargs="+", type=int, default=list(RANKS), help="ranks of the adapters")
    parser.add_argument("--seeds", type=int, default=3, help="seeds, 2 to 10")
    parser.add_argument("--domains", type=int, default=10, help="how many domains, 2 to 10")
    parser.add_argument("--per-intent", type=int, default=50, help="training rows an intent, at most 100")
    parser.add_argument("--epochs", type=int, default=1, help="epochs of training")
    parser.add_argument("--rate", type=float, default=1e-2, help="learning rate of all adapters and heads")
    parser.add_argument("--finished", action="store_true", help="write the page of what is measured so far")
    parser.add_argument("--train-only", action="store_true", help="train the adapters, and merge nothing")
    given = parser.parse_args(arguments)
    quiet_libraries()
    data = write_data(given)
    if given.train_only:
        for method in given.methods:
            for rank, seed in _cells(given):
                runs_of(given, data, method, rank, seed)
        return
    result = rounded(measure(given, data))
    given.docs.mkdir(parents=True, exist_ok=True)
    (given.docs / "merging-compared.json").write_text(json.dumps(result, indent=1) + "\n")
    (given.docs / "merging-compared.md").write_text(page(result))


def _cells(given: argparse.Namespace) -> Iterator[tuple[int, int]]:
    return ((rank, seed) for rank in given.ranks for seed in range(1, given.seeds + 1))


def write_data(given: argparse.Namespace) -> dict[str, dict[str, Path]]:
    """The rows of each domain as files, by domain and split; the first of each intent."""
    limits = {"train": given.per_intent, "validation": 4, "test": 20}
    rows: dict[str, dict[str, dict[str, list[str]]]] = {}
    with gzip.open(ROWS, "rt", encoding="utf-8") as file:
        for line in map(json.loads, file):
            intents = rows.setdefault(line["domain"], {}).setdefault(line["split"], {})
            texts = intents.setdefault(line["intent"], [])
            if len(texts) < limits[line["split"]]:
                texts.append(line["text"])
    found: dict[str, dict[str, Path]] = {}
    for domain in sorted(rows)[: given.domains]:
        for split, intents in rows[domain].items():
            path = given.output / "data" / domain / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = (json.dumps({"text": t, "label": intent}) for intent, texts in intents.items() for t in texts)
            text = "\n".join(lines) + "\n"
            if not path.is_file() or path.read_text(encoding="utf-8") != text:  # another process may be reading it
                path.write_text(text, encoding="utf-8")
            found.setdefault(domain, {})[split] = path
    return found


def runs_of(
    given: argparse.Namespace, data: dict[str, dict[str, Path]], method: str, rank: int, seed: int
) -> list[Path]:
    """The folders of the ten runs, trained where they have not been."""
    folders = []
    for slot, (domain, files) in enumerate(data.items()):
        folder = given.output / f"{method}-r{rank}-seed{seed}" / domain
        options: dict[str, Any] = {"name": method, "rank": rank}
        if method == "ortha":
            options["slot"] = slot
        recipe = build_recipe(
            flags={
                "model": MINILM,
                "data.train": str(files["train"]),
                "data.validation": str(files["validation"]),
                "data.test": str(files["test"]),
                "data.max_length": 32,
                "method": options,
                "targets": "query-value",
                "head": "random",
                "training.num_train_epochs": given.epochs,
                "training.per_device_train_batch_size": 32,
                "training.learning_rate": given.rate,
                "save_second_moments": True if method == "lora" else None,
                "output": str(folder),
                "seed": seed,
            }
        )
        train(recipe, resume=RunFolder(folder).is_run())
        folders.append(folder)
    return folders


def measure(given: argparse.Namespace, data: dict[str, dict[str, Path]]) -> dict[str, Any]:
    """All figures of the page."""
    about = {"date": now(), "machine": machine("cpu"), "versions": versions()}
    contenders = [
        one for one in CONTENDERS if one.method in given.methods and (given.rules is None or one.rule in given.rules)
    ]
    cells: list[dict[str, Any]] = []
    for rank, seed in _cells(given):
        for method in dict.fromkeys(one.method for one in contenders):
            folders = runs_of(given, data, method, rank, seed)
            cells.append(_kept(given, f"alone-{method}-r{rank}-seed{seed}", partial(_alone, folders, method)))
            cells[-1] |= {"rank": rank, "seed": seed}
            for one in contenders:
                if one.method == method:
                    name = f"{one.title.replace(' ', '-')}-r{rank}-seed{seed}"
                    measured = _recovered if one.rule == "rmm" else _merged
                    make = partial(measured, one, folders, given.output / "merged" / name)
                    cells.append(_kept(given, name, make))
                    cells[-1] |= {"rank": rank, "seed": seed}
    costs = {
        f"{one.title}, rank {rank}": _kept(
            given,
            f"cost-of-{one.title.replace(' ', '-')}-r{rank}",
            partial(cost, one, runs_of(given, data, one.method, rank, 1)),
        )
        for rank in given.ranks
        for one in contenders
    }
    cells = [cell for cell in cells if "title" in cell]
    options = ("per_intent", "epochs", "rate", "seeds", "domains")
    return {**about, "settings": {name: getattr(given, name) for name in options}, "cells": cells, "costs": costs}


def _kept(given: argparse.Namespace, name: str, make: Any) -> dict[str, Any]:
    """What was measured before under that name, or is measured now."""
    file = given.output / "results" / f"{name}.json"
    if not file.is_file() and given.finished:
        return {}
    if not file.is_file():
        Screen().say(name)
        found = make()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found))
    return json.loads(file.read_text())


def _alone(folders: list[Path], method: str) -> dict[str, Any]:
    """Each domain with its own adapter, and with none: the runs' test metrics, and the heads on the bare model."""
    own = {}
    for folder in folders:
        own |= _accuracy(Tasks([folder], "test", rows=TEST_ROWS), RunFolder(folder).adapter)
    bare = _accuracy(Tasks(folders, "test", rows=TEST_ROWS), None)
    return {"title": f"alone, {method}", "method": method, "accuracy": own, "bare": bare}


def _merged(one: Contender, folders: list[Path], output: Path) -> dict[str, Any]:
    """One merge, at the scale that does best on the validation rows."""
    adapters = [RunFolder(folder).adapter for folder in folders]
    names = [folder.name for folder in folders]
    if one.rule == "fisher":
        for adapter in adapters:
            if not (adapter / STATISTICS["fisher"]).is_file():
                collect_fisher(adapter, examples=EXAMPLES, progress=False)
    common: dict[str, Any] = {"names": names, "modules": "drop", "progress": False}
    whole = output / "whole"
    result = merge(adapters, one.rule, [1.0] * len(adapters), whole, options=one.options, **common)
    candidates = {1.0: whole}
    for scale in one.scales:
        if scale != 1:
            candidates[scale] = output / f"{scale:g}"
            if one.fractions:
                merge(adapters, one.rule, [scale] * len(adapters), candidates[scale], options=one.options, **common)
            else:
                merge([whole], "sum", [scale], candidates[scale], progress=False)
    validation, test = Tasks(folders, "validation", rows=VALIDATION_ROWS), Tasks(folders, "test", rows=TEST_ROWS)
    tried = {scale: validation.score(adapter) for scale, adapter in candidates.items()}
    best = max(tried, key=tried.__getitem__)
    return {
        "title": one.title,
        "method": one.method,
        "rule": one.rule,
        "scale": best,
        "tried": tried,
        "accuracy": _accuracy(test, candidates[best]),
        "merged_rank": max(result.ranks.values()),
        "error": result.error,
    }


def _recovered(one: Contender, folders: list[Path], output: Path) -> dict[str, Any]:
    """The adapters as a few basis models, and each domain with its own adapter, got back by name."""
    names = [folder.name for folder in folders]
    adapters = [RunFolder(folder).adapter for folder in folders]
    found = compress_adapters(adapters, output / "compressed", names, progress=False, **one.options)
    accuracy: dict[str, float] = {}
    for folder in folders:
        back = recover_adapter(output / "compressed", folder.name, output / folder.name)
        accuracy |= _accuracy(Tasks([folder], "test", rows=TEST_ROWS), back)
    errors = [error for sites in found.errors.values() for error in sites.values()]
    return {
        "title": one.title,
        "method": one.method,
        "rule": one.rule,
        "scale": 1.0,
        "accuracy": accuracy,
        "merged_rank": one.options["basis"],
        "error": max(found.errors.values()),
        "predicted_off_by": max(abs(error.factors - error.predicted) for error in errors),
        "share": found.values / found.separate_values,
    }


def cost(one: Contender, folders: list[Path]) -> dict[str, float]:
    """Seconds of one merge, and the memory that it took beside what there was, in a process of its own."""
    adapters = [str(RunFolder(folder).adapter) for folder in folders]
    with tempfile.TemporaryDirectory() as scratch:
        where, threads = str(Path(scratch) / "merged"), str(torch.get_num_threads())
        found = run_child("benchmarks.one_merge", [one.rule, json.dumps(one.options), where, threads, *adapters])
    return {"seconds": found["seconds"], "memory_bytes": found["added_bytes"]}


def _accuracy(tasks: Tasks, adapter: Path | None) -> dict[str, float]:
    return {name: metrics["accuracy"] for name, metrics in tasks.metrics(adapter).items()}


def page(result: dict[str, Any]) -> str:
    """The page as Markdown: for each rank the adapters alone, then the rules, best mean first."""
    settings, cells = result["settings"], result["cells"]
    opening = OPENING.format(
        **settings,
        validation_rows=VALIDATION_ROWS,
        predicted=f"{max((cell.get('predicted_off_by', 0.0) for cell in cells), default=0.0):.0e}",
        test_rows=TEST_ROWS,
        scales=", ".join(f"{scale:g}" for scale in sorted(SCALES)),
        where=f"{result['machine']['cpu']}, {result['machine']['threads']} threads; commit "
        f"{result['versions'].get('commit', 'unknown')}; {result['date']}.",
    )
    parts = [opening]
    for rank in dict.fromkeys(cell["rank"] for cell in cells):
        rows: dict[str, list[dict[str, Any]]] = {}
        for cell in cells:
            if cell["rank"] == rank:
                rows.setdefault(cell["title"], []).append(cell)
        alone = {found[0]["method"]: found for title, found in rows.items() if "rule" not in found[0]}
        body = [_row(title, found, found) for title, found in rows.items() if "rule" not in found[0]]
        bare = [{**cell, "accuracy": cell["bare"]} for cell in next(iter(alone.values()))]
        body.append(_row(f"no adapter, heads of {next(iter(alone))}", bare, next(iter(alone.values()))))
        merged = [(title, found) for title, found in rows.items() if "rule" in found[0]]
        short = [title for title, found in merged if len(found) < settings["seeds"]]
        merged = [(title, found) for title, found in merged if title not in short]
        merged.sort(key=lambda entry: -statistics.fmean(map(_mean, entry[1])))
        body += [
            _row(title, found, alone[found[0]["method"]], result["costs"][f"{title}, rank {rank}"])
            for title, found in merged
        ]
        header = ["merged", "accuracy", "relative to alone, %", "scale", "rank", "error", "seconds", "MB"]
        left_out = f"\nLeft out, for not all seeds were measured: {'; '.join(short)}.\n" if short else ""
        parts.append(f"## Adapters of rank {rank}\n\n{table(header, body)}\n{left_out}")
    return "\n".join(parts)


def _mean(cell: dict[str, Any]) -> float:
    return statistics.fmean(cell["accuracy"].values())


def _row(
    title: str, found: list[dict[str, Any]], alone: list[dict[str, Any]], cost: dict[str, float] | None = None
) -> list[str]:
    relative = [
        100 * statistics.fmean(cell["accuracy"][name] / own["accuracy"][name] for name in own["accuracy"])
        for cell, own in zip(found, alone, strict=True)
    ]
    row = [title, score(Interval.of([_mean(cell) for cell in found]), "accuracy")]
    row.append(f"{statistics.fmean(relative):.1f} ± {half_width(relative):.1f}")
    if cost is None:
        return [*row, "", "", "", "", ""]
    error = statistics.median(cell["error"] for cell in found)
    scales = sorted({cell["scale"] for cell in found})
    return [
        *row,
        ", ".join(f"{scale:g}" for scale in scales),
        str(max(cell["merged_rank"] for cell in found)),
        f"{error:.2f}" if error > 1e-3 else "0",
        f"{cost['seconds']:.2f}" if cost else "",
        f"{cost['memory_bytes'] / 2**20:.0f}" if cost else "",
    ]


if __name__ == "__main__":
    main()
