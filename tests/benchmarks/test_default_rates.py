"""The table of what default learning rates reach says what the committed runs say."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import rates
from isotune.adapters.registry import method_class


def test_the_table_is_that_of_the_committed_runs() -> None:
    assert rates.section(rates.DOCS) in (rates.DOCS / rates.PAGE).read_text(), (
        "docs/learning-rates.md is stale: run python -m benchmarks.rates"
    )


def test_a_rates_share_of_the_gain_is_counted_from_the_frozen_model(tmp_path: Path) -> None:
    default = method_class("lora").learning_rate
    for bed, (_, metric, factor) in rates.BEDS.items():
        folder = tmp_path / "examples" / "rates" / bed
        folder.mkdir(parents=True)
        sign = 1 if factor > 0 else -1
        scores = {default / 10: 0.5, default: 0.7, default * 5: 0.9}
        lines = [
            {
                "method": "lora",
                "kind": "trial",
                "status": "done",
                "learning_rate": rate,
                "metrics": {metric: sign * one},
            }
            for rate, one in scores.items()
        ]
        lines.append({"kind": "seed", "status": "done", "learning_rate": 1.0, "metrics": {}})
        lines = [{"method": "lora", **line} for line in lines]
        lines.append({"method": "frozen", "kind": "seed", "status": "done", "metrics": {metric: sign * 0.5}})
        (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        found = {"method": "lora", "learning_rate": 3 * default, metric: sign * 0.8}
        (folder / "auto.jsonl").write_text(json.dumps(found) + "\n")
    runs = [("frozen base", 0.0, 1, 0.4), ("lora", default, 0, 0.5), ("lora", 2 * default, 0, 0.6)]
    runs += [("lora", 4 * default, 0, 0.3), ("lora", 2 * default, 1, 0.9)]
    (tmp_path / "convolutions-compared.jsonl").write_text(
        "".join(json.dumps({"name": n, "rate": r, "seed": s, "validation": v}) + "\n" for n, r, s, v in runs)
    )
    line = "| lora | 0.002 | 5 x (edge) | 50 % | 3 x | 75 % | 5 x (edge) | 50 % | 3 x | 75 % | 2 x | 50 % |"
    assert line in rates.section(tmp_path)
