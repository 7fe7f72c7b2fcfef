"""What `learning_rate: auto` finds on the beds of this folder, and what training at that rate comes to.

    python examples/compare-rates/auto.py examples/compare-rates/scicite.yaml docs/examples/rates/scicite/auto.jsonl

from the root of the repository: for each method of the comparison, at its size there, one run with the seed of the
trials, that sees the same rows. A line each; methods that are in the file are left out when the script is run again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from rich.progress import track

from isotune.comparison.plan import Cell, make_plan
from isotune.comparison.recipe import ComparisonRecipe, build_comparison
from isotune.comparison.results import FROZEN
from isotune.training.run import train
from isotune.training.tasks.names import TASKS


def main() -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a comparison's recipe")
    parser.add_argument("output", type=Path, help="a .jsonl file, which grows by a line for each method")
    args = parser.parse_args()
    recipe = build_comparison(args.recipe)
    lines = args.output.read_text().splitlines() if args.output.exists() else []
    done = {json.loads(line)["method"] for line in lines}
    cells = [cell for cell in make_plan(recipe) if cell.label not in done and cell.method["name"] != FROZEN]
    for cell in track(cells, description="methods"):
        found = one_run(recipe, cell)
        with args.output.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(json.dumps(found))


def one_run(recipe: ComparisonRecipe, cell: Cell) -> dict[str, object]:
    """The rate that was found, and the score on the validation rows."""
    with tempfile.TemporaryDirectory() as folder:
        run = recipe.run(cell.method, None, recipe.seed, Path(folder) / "run", test=False)
        run = run.model_copy(update={"training": run.training | {"learning_rate": "auto"}})
        metrics = train(run, progress=False).metrics
    score = f"validation_{TASKS[recipe.task].metric}"
    return {"method": cell.label, "learning_rate": metrics["learning_rate"], score: metrics[score]}


if __name__ == "__main__":
    main()
