"""`python -m benchmarks.render`: the README and the plots from the results files, and from nothing else."""

from __future__ import annotations

from pathlib import Path

from benchmarks.goals import describe, goals, gpu_goals
from benchmarks.plots import log_log
from benchmarks.store import Results, full, read_results, rows
from benchmarks.tables import (
    decoding_table,
    disk_tables,
    goal_table,
    growth_table,
    launch_table,
    left_out,
    loss_table,
    method_table,
    optimizer_table,
    provenance,
    ratio_table,
)

HERE = Path(__file__).parent

OPENING = """# What adapters cost

Written by `python -m benchmarks.render` from `results/*.json`; do not edit. `make bench` measures and renders
(about 20 minutes on two quiet cores; `make bench BENCH=--quick` for a first look, `BENCH="--only layer"` for one
section, `BENCH="--device cuda"` on a GPU).

All contenders run side by side in one process and take turns, repetition by repetition. A figure is the median; a
ratio is a ratio of medians to PEFT's LoRA of the same rank, so 1 is LoRA's cost and less is better. In brackets:
quartiles. `*`: fewer than five repetitions. OFT has blocks of 32, BOFT blocks of 8 and two factors, at every rank.
`frozen` is the layer without an adapter, in a model only its forward pass. "Plain input" wants no gradient;
PEFT's HRA and BOFT are not run on it."""

PROMISES = "Forward + backward unless it says else. Quick runs do not count here."

SECTIONS = (
    ("layer", "One Linear", (("total", "ms", "Forward + backward"), ("forward", "ms", "Forward"), (
        "saved", "MiB", "Bytes saved for backward, the frozen weight among them"), (
        "saved_without_frozen", "MiB", "Bytes saved for backward, without the frozen weight"))),
    ("conv", "One 3 x 3 convolution", (("total", "ms", "Forward + backward"), (
        "saved", "MiB", "Bytes saved for backward"))),
    ("model", "Whole training steps", (("total", "ms", "Forward, backward and AdamW"),)),
    ("memory", "Peak memory of a training step", (("peak", "MiB", "Resident peak of a process of its own"),)),
)  # fmt: skip


def render(results: Results, cuda: Results) -> dict[str, str]:
    """The text of every generated file, by its path under benchmarks/."""
    files = plots(results)
    parts = [OPENING]
    if results:
        parts += [
            "## Promises",
            PROMISES,
            goal_table(goals(full(results))),
            *_growth(results, files),
            *_sections(results),
            *_methods(results),
            *_disk(results),
            *_optimizers(results),
            *_few(results),
        ]
    if cuda:
        parts += ["# On a GPU", "bf16; PEFT keeps adapters in fp32 unless told otherwise (`peft-lora-bf16`)."]
        parts += [goal_table(gpu_goals(full(cuda))), *_sections(cuda), *_methods(cuda), *_disk(cuda)]
        parts += [*_optimizers(cuda), *_few(cuda)]
    return {"README.md": "\n\n".join(parts) + "\n", **files}


def _sections(results: Results) -> list[str]:
    parts = []
    for section, title, phases in SECTIONS:
        if section not in results:
            continue
        parts += [f"## {title}", provenance(results[section])]
        for phase, unit, caption in phases:
            parts += [f"{caption}:", ratio_table(rows(results, section), phase, unit)]
        if missing := left_out(rows(results, section)):
            parts += ["Left out:", "\n".join(missing)]
    return parts


def _growth(results: Results, files: dict[str, str]) -> list[str]:
    if "growth" not in results:
        return []
    images = " ".join(f"![{Path(path).stem}]({path})" for path in files)
    text = "The extra seconds over the frozen layer, forward + backward, and the exponents fitted at the large end:"
    return ["## Growth", provenance(results["growth"]), text, growth_table(results), images]


def _methods(results: Results) -> list[str]:
    if "methods" not in results:
        return []
    found = rows(results, "methods")
    text = (
        f"Every method on one Linear ({describe(found[0]['case'])}, which only some methods have; the rest at its "
        "defaults): forward + backward, as a ratio to PEFT's LoRA of that rank, and bytes saved for backward with "
        "the frozen weight among them. *PEFT's own* is its layer for the config that our saved adapter has."
    )
    parts = ["## Every method", provenance(results["methods"]), text, method_table(found)]
    missing = left_out(found)
    return [*parts, "Left out:", "\n".join(missing)] if missing else parts


def _disk(results: Results) -> list[str]:
    return ["## On disk", provenance(results["disk"]), disk_tables(results)] if "disk" in results else []


def _optimizers(results: Results) -> list[str]:
    if "optimizers" not in results:
        return []
    found = rows(results, "optimizers")
    case = found[0]["case"]
    text = (
        f"The step alone, on the factors of a LoRA on all linear layers of {case['model']} ({2 * 7 * case['blocks']} "
        "matrices); ratios are to `torch.optim.Muon`. Ours iterates in fp32 unless it says bf16, the others in bf16."
    )
    return ["## Steps of optimizers", provenance(results["optimizers"]), text, optimizer_table(found)]


def _few(results: Results) -> list[str]:
    parts = []
    if "launches" in results:
        case = rows(results, "launches")[0]["case"]
        text = (
            f"A Linear of {case['d']} x {case['d']} in bf16 with {case['rows']} rows, r = {case['rank']} where there "
            "is one: operations that compute something (on a GPU: kernels), which is what counts if rows are few."
        )
        found = rows(results, "launches")
        parts += ["## Launches", provenance(results["launches"]), text, launch_table(found)]
    if "decoding" in results:
        text = (
            "One more token for each row of a batch, as ratios to the model without an adapter. "
            "`isotune-lora-by-row`: several adapters in one batch, each row with its own."
        )
        found = rows(results, "decoding")
        parts += ["## A token", provenance(results["decoding"]), text, decoding_table(found)]
    if "loss" in results:
        text = "A training step with HRA, and the peak of memory beyond that of the model itself; three runs of each."
        parts += ["## A language model's loss in chunks of rows", provenance(results["loss"]), text]
        parts.append(loss_table(rows(results, "loss")))
    return parts


def plots(results: Results) -> dict[str, str]:
    """One plot for each axis of growth."""
    files = {}
    for row in rows(results, "growth"):
        axis, points = row["case"]["axis"], row["points"]
        series = {"frozen": [(p["value"], p["frozen"]["median"] * 1e3) for p in points]}
        for name in row["exponents"]:
            series[f"+ {name}"] = [(p["value"], p["extra"][name] * 1e3) for p in points if p["extra"][name] > 0]
        title = f"Forward + backward, and what an adapter adds, over {axis}"
        files[f"results/growth-{axis}.svg"] = log_log(title, axis, "ms", series)
    return files


def main() -> None:
    """Write the files, and show the promises."""
    folder = HERE / "results"
    results, cuda = read_results(folder), read_results(folder, "cuda")
    for path, text in render(results, cuda).items():
        (HERE / path).write_text(text)
    print(goal_table(goals(results)))
    if cuda:
        print(goal_table(gpu_goals(cuda)))
    if "growth" in results:
        print(growth_table(results))


if __name__ == "__main__":
    main()
