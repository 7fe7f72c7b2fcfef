"""`python -m benchmarks.accuracy`: every method on one real task, at one budget, with learning rates searched alike.

all-MiniLM-L6-v2 on SciCite, adapters on the query and value projections, the encoder's budget that of HRA of rank 8
(36,864 parameters) or what a method can come nearest to. Every method gets the same learning rates with seed 0, on
the validation rows; then fresh seeds at its best, on the test rows. Finished runs are kept: stop it, and start it
again to go on.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import isotune
from benchmarks.__main__ import rounded
from benchmarks.machine import machine, now, versions
from benchmarks.tables import table
from benchmarks.timing import Effort, Step, alternate
from isotune.adapters.budget import nearest_to, total_parameters
from isotune.adapters.registry import method_names
from isotune.errors import IsotuneError
from isotune.intervals import half_width
from isotune.model.calibrate import wants_calibration
from isotune.model.targets import find_targets
from isotune.sites import Site, require_site
from isotune.training.classifiers import load_classifier
from isotune.training.demo import compare
from isotune.training.models import MINILM

BUDGET = 36_864
RATES = (3e-3, 1e-2, 3e-2, 1e-1)
DOCS = Path(__file__).parent.parent / "docs"
BASELINE = "lora"

OPENING = """# The methods compared

Written by `python -m benchmarks.accuracy`, from `methods-compared.json`; do not edit.

all-MiniLM-L6-v2 learns what a citation in SciCite is for (background, method or result): adapters on the query and
value projections of all layers, the head from a converged linear probe. Every method has the size that comes nearest
to {budget:,} parameters in the encoder, and the same {trials} learning rates ({rates}), tried with seed 0 and
chosen on the validation rows; then {seeds} fresh seeds at the best, {rows} training rows, one epoch in batches of
16. Accuracy on {eval_rows} test rows: mean and 95 % t-interval over the seeds, and the paired difference to LoRA with
its interval. Peak memory is that of the same runs, relative to LoRA's. Time a step is measured apart: each method
beside LoRA in one process, by turns, the ratio of the medians, on a batch of 16 x 64 tokens; LoRA's row, beside
itself, shows how exact that is.

A rate at an end of the grid is marked: beyond it the method may do better. {rows} rows are few: a wide interval means
that the rate which did best for one seed did badly for another, and a difference smaller than its interval means
nothing.

The linear probe alone reaches {probe:.1f}. {where}{note}
"""


def sized(name: str, sites: list[Site]) -> dict[str, Any]:
    """The method's name and options, with the size nearest to the budget, and its parameters then.

    Raises OptionError or TargetError where the method cannot adapt these layers.
    """
    settings = nearest_to(BUDGET, isotune.method(name), sites)
    for site in sites:
        settings.check(site)
    return {
        "method": {"name": name, **settings.model_dump(exclude_unset=True)},
        "parameters": total_parameters(settings, sites),
    }


def main(arguments: list[str] | None = None) -> None:
    """Parse the options, run what has not been run, and write the page."""
    parser = argparse.ArgumentParser("benchmarks.accuracy", description="Compare all methods on SciCite.")
    parser.add_argument("--output", type=Path, default=Path("runs/compared"), help="folder of the runs: %(default)s")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the page: %(default)s")
    parser.add_argument("--methods", nargs="+", default=None, help="some methods only (LoRA is always there)")
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES), help="learning rates to try")
    parser.add_argument("--seeds", type=int, default=3, help="seeds at the best rate, 2 to 10")
    parser.add_argument("--rows", type=int, default=640, help="training rows, in batches of 16")
    parser.add_argument("--eval-rows", type=int, default=None, help="validation and test rows; by default all")
    parser.add_argument("--step-seconds", type=float, default=4.0, help="seconds to time each method's step for")
    given = parser.parse_args(arguments)
    result = measure(given)
    given.docs.mkdir(parents=True, exist_ok=True)
    (given.docs / "methods-compared.json").write_text(json.dumps(rounded(result), indent=1) + "\n")
    (given.docs / "methods-compared.md").write_text(page(result))


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """All figures of the page."""
    about = {"date": now(), "machine": machine("cpu"), "versions": versions()}
    model = load_classifier(MINILM, ["0", "1", "2"], "mean")
    sites = [require_site(layer, path) for path, layer in find_targets(model, "query-value").items()]
    chosen, left_out = {}, {}
    for name in dict.fromkeys([BASELINE, *(given.methods or method_names())]):
        try:
            chosen[name] = sized(name, sites)
        except IsotuneError as error:
            left_out[name] = str(error)
    rows = {"data.max_train_rows": given.rows, "training.per_device_train_batch_size": 16}
    if given.eval_rows:
        rows["data.max_eval_rows"] = given.eval_rows
    methods = {name: size["method"] for name, size in chosen.items()}
    found = compare(given.output, given.seeds, methods, given.rates, rows)
    return {
        **about,
        "budget": BUDGET,
        "rates": given.rates,
        "seeds": found.seeds,
        "rows": given.rows,
        "eval_rows": given.eval_rows,
        "probe_accuracy": found.probe_accuracy,
        "left_out": left_out,
        "methods": {
            name: {
                **chosen[name],
                "searched": found.searched[name],
                "rate": found.rate[name],
                "accuracy": found.accuracy[name],
                "difference": found.difference(name, BASELINE) if name != BASELINE else None,
                "step_ratio": step_ratio(chosen[name]["method"], chosen[BASELINE]["method"], given.step_seconds),
                "peak_memory_bytes": _mean(found.runs[name], "peak_memory_bytes"),
            }
            for name in chosen
        },
    }


def step_ratio(method: dict[str, Any], baseline: dict[str, Any], seconds: float) -> float:
    """A training step with the method over one with the baseline: both in this process, by turns, medians.

    A step is forward, backward, AdamW and `after_step`, on 16 sequences of 64 tokens. `seconds` are spent on each.
    """
    model = load_classifier(MINILM, ["0", "1", "2"], "mean")
    generator = torch.Generator().manual_seed(0)
    batch = {
        "input_ids": torch.randint(1000, 30000, (16, 64), generator=generator),
        "attention_mask": torch.ones(16, 64, dtype=torch.long),
        "labels": torch.randint(3, (16,), generator=generator),
    }
    steps = {}
    for key, options in {"method": method, "baseline": baseline}.items():
        adapted = isotune.adapt(
            copy.deepcopy(model), isotune.method(**options), "query-value", train_also=["head"], seed=0
        )
        if wants_calibration(adapted):
            isotune.calibrate(adapted, [batch], progress=False)
        steps[key] = _step(adapted.train(), batch)
    found = alternate(steps, Effort(seconds, least=5, most=60))
    return statistics.median(found["method"].phases["total"]) / statistics.median(found["baseline"].phases["total"])


def _step(model: nn.Module, batch: dict[str, Tensor]) -> Step:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> dict[str, float]:
        start = time.perf_counter()
        (model(**batch).loss + isotune.penalty(model)).backward()
        optimizer.step()
        isotune.after_step(model)
        optimizer.zero_grad()
        return {"total": time.perf_counter() - start}

    return step


def _mean(runs: list[dict[str, Any]], key: str) -> float:
    return statistics.fmean(run[key] for run in runs)


def page(result: dict[str, Any]) -> str:
    """The page as Markdown, best mean first."""
    found, baseline = result["methods"], result["methods"][BASELINE]
    body = []
    for name, row in sorted(found.items(), key=lambda entry: -statistics.fmean(entry[1]["accuracy"])):
        accuracy = [100 * value for value in row["accuracy"]]
        difference = (
            "" if row["difference"] is None else "{:+.1f} ± {:.1f}".format(*(100 * d for d in row["difference"]))
        )
        options = ", ".join(f"{key}={value}" for key, value in row["method"].items() if key != "name")
        edge = row["rate"] in (min(result["rates"]), max(result["rates"]))
        body.append(
            [
                f"{name} {options}".strip(),
                f"{row['parameters']:,}",
                f"{row['rate']:g}{' (edge)' if edge else ''}",
                f"{statistics.fmean(accuracy):.1f} ± {half_width(accuracy):.1f}",
                difference,
                f"{row['step_ratio']:.2f}",
                f"{row['peak_memory_bytes'] / baseline['peak_memory_bytes']:.2f}",
            ]
        )
    header = ["method", "parameters", "learning rate", "accuracy", "minus LoRA", "time a step", "peak memory"]
    opening = OPENING.format(
        budget=result["budget"],
        trials=len(result["rates"]),
        rates=", ".join(f"{rate:g}" for rate in result["rates"]),
        seeds=len(result["seeds"]),
        rows=result["rows"],
        eval_rows=result["eval_rows"] or "all",
        probe=100 * result["probe_accuracy"],
        note=f"\n\n{result['note']}" if "note" in result else "",
        where=f"{result['machine']['cpu']}, {result['machine']['threads']} threads; commit "
        f"{result['versions'].get('commit', 'unknown')}; {result['date']}.",
    )
    missing = "".join(f"\nLeft out: {name}, because {reason}\n" for name, reason in result["left_out"].items())
    return f"{opening}\n{table(header, body)}\n{missing}"


if __name__ == "__main__":
    main()
