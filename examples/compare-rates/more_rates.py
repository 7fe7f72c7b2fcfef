r"""Rates beyond those that a comparison of this folder tried, a line each in its results.jsonl.

    python examples/compare-rates/more_rates.py examples/compare-rates/scicite.yaml \
        docs/examples/rates/scicite/results.jsonl --multiples 21.5 46.4 --methods lora dora

from the root of the repository: trials at multiples of each method's own rate, and the frozen model. With
`--measured` they are runs that the test rows and what was forgotten are measured on, too. Runs that are in the file
are left out when it is called again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from rich.progress import track

from isotune.comparison.one_run import Bench
from isotune.comparison.plan import make_plan
from isotune.comparison.recipe import build_comparison
from isotune.comparison.results import FROZEN
from isotune.comparison.units import Unit


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a comparison's recipe")
    parser.add_argument("results", type=Path, help="the .jsonl file of its results")
    parser.add_argument("--multiples", type=float, nargs="+", required=True, help="of each method's own rate")
    parser.add_argument("--methods", nargs="+", help="rows by name; by default all")
    parser.add_argument("--measured", action="store_true", help="measure test rows and forgetting as well")
    args = parser.parse_args()
    recipe = build_comparison(args.recipe)
    lines = args.results.read_text().splitlines() if args.results.exists() else []
    done = {(line["kind"], line["unit"]) for line in map(json.loads, lines)}
    cells = [cell for cell in make_plan(recipe) if cell.rate and cell.label in (args.methods or [cell.label])]
    kind = "seed" if args.measured else "trial"
    frozen = [cell for cell in make_plan(recipe) if cell.label == FROZEN]
    units = [Unit(cell, "seed", None, recipe.seed) for cell in frozen]
    units += [
        Unit(cell, kind, float(f"{cell.rate * multiple:.3g}"), recipe.seed + args.measured)
        for cell in cells
        for multiple in args.multiples
    ]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(recipe, Path(folder))
        for unit in track([unit for unit in units if (unit.kind, unit.name) not in done], description="runs"):
            line = bench.run(unit).model_dump() | {"run": None}
            with args.results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(unit.name, line["status"], json.dumps(line["metrics"])[:200])


if __name__ == "__main__":
    main()
