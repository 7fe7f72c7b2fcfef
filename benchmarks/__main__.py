"""`python -m benchmarks`: measure, one results file a section. `python -m benchmarks.render` makes the README."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import conv, decoding, disk, growth, launches, layer, loss, memory, methods, model, optimizers
from benchmarks.machine import machine, now, versions
from benchmarks.options import Options

SECTIONS: dict[str, Any] = {
    "layer": layer,
    "conv": conv,
    "methods": methods,
    "growth": growth,
    "model": model,
    "launches": launches,
    "decoding": decoding,
    "loss": loss,
    "memory": memory,
    "disk": disk,
    "optimizers": optimizers,
}
RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str] | None = None) -> None:
    """Parse the options and run the sections."""
    parser = argparse.ArgumentParser("benchmarks", description="Time isotune and PEFT side by side.")
    parser.add_argument("--quick", action="store_true", help="small cases, few repetitions: about a minute")
    parser.add_argument("--only", action="append", choices=SECTIONS, help="this section (can be repeated)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--layers", type=int, default=4, help="layers of the 7B-shaped export (default: 4 of 32)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    arguments = sys.argv[1:] if arguments is None else arguments
    given = vars(parser.parse_args(arguments))
    only, output = given.pop("only"), given.pop("output")
    if only is not None:
        run(Options(**given), only, output)
        return
    for section in SECTIONS:
        # In a process of its own: PEFT's dense products leave gigabytes in a heap that never shrinks.
        subprocess.run([sys.executable, "-m", "benchmarks", *arguments, "--only", section], check=True)


def run(options: Options, sections: list[str], output: Path) -> None:
    """Run the named sections and write a file for each as soon as it is done; a full one replaces a quick one."""
    torch.set_num_threads(options.threads)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for section in sections:
            device = "cuda" if options.cuda else "cpu"
            quick = output / f"{device}-quick-{section}.json"
            result = run_section(section, options, progress)
            write(quick if options.quick else output / f"{device}-{section}.json", result)
            if not options.quick:
                quick.unlink(missing_ok=True)  # superseded


def run_section(section: str, options: Options, progress: Progress | None = None) -> dict[str, Any]:
    """All cases of one section, with the machine, the versions and the settings."""
    about = {
        "section": section,
        "date": now(),
        "settings": asdict(options),
        "machine": machine(options.device),
        "versions": versions(),
    }
    cases = list(SECTIONS[section].cases(options))
    task = progress.add_task(section, total=len(cases)) if progress else None
    rows, start = [], time.perf_counter()
    for case in cases:
        if progress:
            progress.update(task, description=f"{section}: {case.title}")
        rows.append(SECTIONS[section].measure(case, options))
        if progress:
            progress.advance(task)
    return about | {"seconds": time.perf_counter() - start, "rows": rows}


def write(file: Path, result: dict[str, Any]) -> None:
    """Write a results file; numbers keep four significant digits."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rounded(result), indent=1) + "\n")


def rounded(value: Any) -> Any:
    """The same structure with floats of four significant digits."""
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(entry) for entry in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
