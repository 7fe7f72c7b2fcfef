"""The table of what default learning rates reach says what the committed runs say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import rates
from isotune.adapters.registry import method_class


def test_the_table_is_that_of_the_committed_runs() -> None:
    assert rates.section(rates.DOCS) in (rates.DOCS / rates.PAGE).read_text(), (
        "docs/learning-rates.md is stale: run python -m benchmarks.rates"
    )


def of_lora(kind: str, rate: float, score: float, metric: str, perplexity: float | None = None) -> dict[str, Any]:
    """A line of a comparison's results."""
    metrics = {metric: score, "test_loss": 0.12345} | (
        {} if perplexity is None else {"forgetting_perplexity": perplexity}
    )
    return {"method": "lora", "kind": kind, "status": "done", "learning_rate": rate, "metrics": metrics}


def written(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_rates_share_of_the_gain_is_counted_from_the_frozen_model(tmp_path: Path) -> None:
    default = method_class("lora").learning_rate
    for bed, (_, metric, factor) in rates.BEDS.items():

        def value(share: float, factor: float = factor) -> float:
            return share if factor > 0 else 5 - share

        scores = {default / 10: 0.5, default: 0.7, default * 5: 0.9, default * 7: 0.6}
        lines = [of_lora("trial", rate, value(one), metric) for rate, one in scores.items()]
        lines += [of_lora("seed", default, 0.0, metric, 12.34), of_lora("seed", default * 5, 0.0, metric)]
        lines.append(of_lora("seed", 1.0, value(0.5), metric) | {"method": "frozen"})
        written(tmp_path / "examples" / "rates" / bed / "results.jsonl", lines)
        found = {"method": "lora", "learning_rate": 3 * default, metric: value(0.8)}
        written(tmp_path / "examples" / "rates" / bed / "auto.jsonl", [found])
    runs = [("frozen base", 0.0, 1, 0.4), ("lora", default / rates.DEPTH, 0, 0.41)]
    runs += [("lora", 2 * default / rates.DEPTH, 0, 0.42), ("lora", 2 * default, 1, 0.9)]
    lines = [{"name": n, "rate": r, "seed": s, "validation": v} for n, r, s, v in runs]
    written(tmp_path / "convolutions-compared.jsonl", lines)
    beds = len(rates.BEDS)
    section = rates.section(tmp_path)
    # Of a gain of two points at the best rate no share is told.
    assert f"| lora | 0.01 |{' 50 % (0.05) |' * beds} +1.0 points (0.02, at the end) |" in section
    assert f"| lora |{' 0.03 | 75 % |' * beds}" in section
    assert "| lora | 0.01, its default | 0.123 | 12.3 |" in section
