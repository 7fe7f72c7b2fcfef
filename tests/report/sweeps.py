"""Made-up results in the folders' formats: comparisons of any size, runs, diagnoses."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

METHODS = ["lora", "hra", "oft", "boft", "dora", "pissa", "vera", "ia3"]
QUALITY = {
    "hra": 0.839,
    "lora": 0.835,
    "oft": 0.836,
    "boft": 0.83,
    "dora": 0.833,
    "pissa": 0.82,
    "vera": 0.79,
    "ia3": 0.775,
}
RATES = [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2]
QUANTILE = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}


def spread(values: list[float]) -> tuple[float, float | None]:
    """Mean and half width of the 95 % t-interval."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, None
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return mean, QUANTILE[len(values)] * deviation / math.sqrt(len(values))


def row(method: str, values: list[float], budget: int | None = 36864, **more: Any) -> dict[str, Any]:
    """A row of a summary with these scores."""
    mean, half = spread(values) if values else (0.0, None)
    return {
        "method": method, "budget": budget, "options": {"rank": 4}, "parameters": budget or 22_000_000,
        "learning_rate": 0.004, "learning_rates": {"0.001": mean - 0.02, "0.004": mean, "0.016": mean - 0.01},
        "edge": False, "values": values, "mean": mean, "half_width": half, "difference": None, "forgetting": {},
        "seconds_per_step": 0.6, "tokens_per_second": 5000.0, "peak_memory_bytes": 1_500_000_000,
        "adapter_bytes": 150_000, "export_rank": 4, "front": False, "runs": [], **more,
    }  # fmt: skip


def summary(rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """A summary with these rows."""
    return {
        "task": "classification", "model": "minilm", "metric": "accuracy", "higher_is_better": True,
        "baseline": "lora", "confidence": "95 % t-interval over seeds",
        "seeds": max(len(r["values"]) for r in rows) if rows else 0, "trials": 6,
        "units": {"planned": 10, "done": 10, "failed": 0}, "forgetting": {}, "rows": rows,
        "environment": {
            "isotune_version": "0.1.0", "torch_version": "2.13.0", "transformers_version": "5.23.0",
            "python_version": "3.11.9", "cpu": "a processor", "threads": 2, "date": "2026-01-01",
        },
        **more,
    }  # fmt: skip


def write_comparison(folder: Path, found: dict[str, Any], units: list[dict[str, Any]] | None = None) -> Path:
    """A comparison's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.yaml").write_text("# A resolved isotune comparison: an example\nmodel: minilm\n")
    (folder / "summary.json").write_text(json.dumps(found))
    (folder / "results.jsonl").write_text("".join(json.dumps(unit) + "\n" for unit in units or []))
    return folder


def sweep(
    folder: Path, budgets: tuple[int, ...] = (36864, 73728), seeds: int = 3, methods: list[str] = METHODS
) -> Path:
    """A comparison of many methods with trials, curves, forgetting; 2 budgets of 8 methods make 157 units."""
    draw = random.Random(0)
    rows, units = [], []
    plan = [(m, b) for b in budgets for m in methods] + [("full", None), ("frozen", None)]
    for method, budget in plan:
        best = {"full": 0.845, "frozen": 0.725}.get(method) or QUALITY[method] + 0.006 * budgets.index(budget)
        top = draw.choice(RATES[1:-1]) if method != "ia3" else RATES[-1]
        name = f"{method}-{budget}" if budget else method
        tried = {} if method == "frozen" else {rate: best - 0.02 * math.log(rate / top) ** 2 / 4 for rate in RATES}
        values = [best + draw.gauss(0, 0.004) for _ in range(1 if method == "frozen" else seeds)]
        mean, half = spread(values)
        parameters = round(budget * draw.uniform(0.97, 1.03)) if budget else 22_713_216 * (method == "full")
        keeps = {"full": 0.80, "frozen": 0.9}.get(method) or draw.uniform(0.84, 0.895)
        forgotten = {}
        for key, level in (("probe_accuracy", keeps), ("similarity", keeps * 0.95)):
            kept = [level + draw.gauss(0, 0.003) for _ in values]
            forgotten[key] = dict(zip(("values", "mean", "half_width"), (kept, *spread(kept)), strict=True))
        step = None if method == "frozen" else 0.9 if method == "full" else draw.uniform(0.58, 0.8)
        common = {
            "method": method,
            "budget": budget,
            "options": {"rank": 4} if budget else {},
            "parameters": parameters,
        }
        rows.append(
            row(
                method, values, budget, options=common["options"], parameters=parameters,
                learning_rate=top if tried else None,
                learning_rates={f"{rate:g}": value for rate, value in tried.items()}, edge=method == "ia3",
                forgetting=forgotten, seconds_per_step=step, difference=None,
                peak_memory_bytes=None if step is None else int(step * 2.4e9), adapter_bytes=parameters * 4,
                export_rank=draw.randint(4, 16) if budget else None,
                runs=[f"runs/{name}-seed-{seed}" for seed in range(1, seeds + 1)],
            )
        )  # fmt: skip
        metrics = {"seconds_per_step": step, "peak_memory_bytes": 1_500_000_000}
        for number, (rate, value) in enumerate(tried.items()):
            units.append(
                {
                    "unit": f"{name}-trial-{number}", "kind": "trial", **common, "learning_rate": rate, "seed": 0,
                    "status": "done", "error": None, "metrics": metrics | {"validation_accuracy": value},
                    "curve": curve(draw, value), "run": None, "seconds": draw.uniform(20, 40),
                }
            )  # fmt: skip
        for seed, value in enumerate(values, 1):
            units.append(
                {
                    "unit": f"{name}-seed-{seed}", "kind": "seed", **common, "learning_rate": top if tried else None,
                    "seed": seed, "status": "done", "error": None,
                    "metrics": metrics | {"test_accuracy": value, "validation_accuracy": value + 0.002},
                    "curve": curve(draw, value), "run": f"runs/{name}-seed-{seed}", "seconds": draw.uniform(20, 40),
                }
            )  # fmt: skip
    for own in rows:
        lora = next(r for r in rows if r["method"] == "lora" and r["budget"] in (own["budget"], budgets[0]))
        if own["budget"] is not None and own["method"] != "lora":
            mean, half = spread([a - b for a, b in zip(own["values"], lora["values"], strict=True)])
            own["difference"] = {"mean": mean, "half_width": half}
    declared = {
        "probe_accuracy": {"base": 0.9, "higher_is_better": True, "label": "linear probe on CLINC150"},
        "similarity": {"base": 1.0, "higher_is_better": True, "label": "similarity to the base's embeddings"},
    }
    total = {"planned": len(units), "done": len(units), "failed": 0}
    return write_comparison(folder, summary(rows, forgetting=declared, units=total, seeds=seeds), units)


def curve(draw: random.Random, end: float, steps: int = 200) -> list[dict[str, float]]:
    """A falling training loss, and validations along the way."""
    found: list[dict[str, float]] = []
    for step in range(5, steps + 1, 5):
        found.append({"step": step, "loss": 0.4 + 0.6 * math.exp(-step / 50) + draw.gauss(0, 0.02)})
        if step % 40 == 0:
            shape = 1 - math.exp(-step / 60)
            found.append({"step": step, "eval_loss": 0.9 - 0.4 * shape, "eval_accuracy": end * (0.8 + 0.2 * shape)})
    return found


def diagnosis(method: str, layers: int = 6, intruders: bool = False, rotation: bool = False) -> dict[str, Any]:
    """A diagnosis of an encoder's queries and values."""
    draw = random.Random(method)
    sites = []
    for layer in range(layers):
        for kind in ("query", "value"):
            weight = [10 * 0.9**j for j in range(10)]
            found = [2, 5] if intruders and layer in (1, 2, 4) else []
            sites.append(
                {
                    "site": f"encoder.layer.{layer}.attention.self.{kind}", "kind": "linear", "method": method,
                    "out_features": 384, "in_features": 384, "trainable": 3072,
                    "orthogonality_error": 1e-7 if rotation else None, "change_norm": draw.uniform(0.01, 0.1),
                    "change_rank": 8, "share": 1 / (2 * layers), "effective_rank": draw.uniform(2, 8),
                    "change_values": [2 * 0.7**j for j in range(24)], "weight_values": weight,
                    "adapted_values": [w * draw.uniform(0.98, 1.1) for w in weight],
                    "similarity": [0.3 if j + 1 in found else 0.95 for j in range(10)], "intruders": found,
                    "variation": {"values": 0.01, "vectors": 0.2},
                    "angles": [draw.betavariate(1, 6) * math.pi for _ in range(8)] if rotation else None,
                }
            )  # fmt: skip
    count = sum(len(site["intruders"]) for site in sites)
    where = sum(bool(site["intruders"]) for site in sites)
    return {
        "path": "somewhere", "kind": "adapter", "method": method, "base_model": "minilm",
        "settings": {"k": 10, "threshold": 0.5, "side": "left"},
        "total": {
            "sites": len(sites), "trainable": 3072 * len(sites), "relative_change": 0.04, "intruders": count,
            "sites_with_intruders": where,
        },
        "sites": sites,
    }  # fmt: skip
