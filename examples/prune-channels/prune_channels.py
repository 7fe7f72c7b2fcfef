"""Prune the inner channels of a pretrained ResNet-20 while adapters train, and write what is left of it as a table.

    python examples/prune-channels/prune_channels.py path/to/images

The folder has train/CLASS/*.jpg and test/CLASS/*.jpg, images of CIFAR-10 of 32 x 32 pixels; the network is the one
that the tests use (tests/data/resnet20, trained on CIFAR-10). "none" prunes at once, by the same norms, and trains
nothing. In all others batch norms train in full beside the adapters, so that their statistics are those of the pruned
network; "batch norms alone" keeps B A at zero, and 0 % pruned is what adapting to these images gives by itself.

Each tries the same number of learning rates, multiples of its method's default, of which rows that train nothing
choose; what the table says is seen on test images, over seeds that took no part in that. Results are written run by
run, and the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path
from typing import Any

import torch

import isotune
from isotune.intervals import Interval

sys.path.insert(0, str(Path(__file__).parents[1]))
import resnet20
from resnet20 import Line, Parts, accuracy, pretrained

INNER = r"layer\d\.\d\.conv\d"
NORMS = [f"layer{k}.{n}.bn{i}" for k in (1, 2, 3) for n in range(3) for i in (1, 2)]
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "none": ("splora", {"rank": 8}),
    "batch norms alone": ("splora", {"rank": 8}),
    "SPLoRA, r = 8, and batch norms": ("splora", {"rank": 8}),
    "SPPaRA and batch norms": ("sppara", {}),
}
"""Each with the method that leaves channels out, and its options."""
STARTS = {"splora": 2e-3, "sppara": 5e-4}
"""Rates whose multiples are tried, as when the runs of the page were made, and steps were not divided for depth."""


def contender(name: str) -> tuple[float, str]:
    """The share that is pruned and the contender, of "50% pruned, none"."""
    share, _, own = name.partition("% pruned, ")
    return int(share) / 100, own


def settings_of(name: str) -> isotune.Settings:
    """The method with its options."""
    pruned, own = contender(name)
    method, options = CONTENDERS[own]
    return isotune.method(method, keep=1 - pruned, **options)


def measured(name: str, rate: float, seed: int, asked: argparse.Namespace, parts: Parts) -> Line:
    """Prune, with a training or without, make the network smaller, and measure it; a trial (seed 0) is not tested."""
    settings, own = settings_of(name), contender(name)[1]
    model = isotune.adapt(pretrained(), settings, INNER, train_also=() if own == "none" else NORMS, seed=seed)
    for path, parameter in model.named_parameters():
        if own in ("none", "batch norms alone") and ".bn" not in path:
            parameter.requires_grad_(False)
    line: Line = {"trained": sum(p.numel() for p in model.parameters() if p.requires_grad), "seconds": 0.0}
    if line["trained"]:
        groups = isotune.parameter_groups(model, lr=rate)
        line["seconds"] = round(resnet20.train(model, parts.train, asked.epochs, groups, seed, asked.bf16), 1)
    isotune.after_step(model)
    line["validation"] = accuracy(model, parts.validation, asked.bf16)
    if seed == 0:
        return line
    masked = accuracy(model, parts.test)
    line["before"] = sum(p.numel() for p in pretrained().parameters())
    line["weights"] = isotune.slim(model).after if contender(name)[0] else line["before"]
    line["test"] = accuracy(model, parts.test)
    # One image may be at the edge of two classes.
    assert abs(line["test"] - masked) <= 1 / len(parts.test[1]), (line["test"], masked)
    return line


def table(lines: list[Line]) -> str:
    """The lines as Markdown, a row for each share and contender, with means and 95 % t-intervals over seeds."""
    text = [
        "| channels pruned | with | weights left | trained | rate | accuracy |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for name in dict.fromkeys(line["name"] for line in lines):
        own = [line for line in lines if line["name"] == name]
        (pruned, title), line = contender(name), own[0]
        found = Interval.of([100 * line["test"] for line in own])
        spread = f" ± {found.half_width:.1f}" if found.half_width else ""
        rate = f"{line['rate']:.4g}{' (edge)' if resnet20.at_an_edge(line) else ''}" if line["trained"] else ""
        left, score = f"{line['weights'] / line['before']:.1%}", f"{found.mean:.1f} %{spread}"
        text.append(f"| {pruned:.0%} | {title} | {left} | {line['trained']:,} | {rate} | {score} |")
    return "\n".join(text)


def rates_of(name: str, factors: list[float]) -> list[float]:
    """The rates that it tries; what trains nothing has none."""
    if contender(name)[1] == "none":
        return [0.0]
    return [float(f"{STARTS[settings_of(name).name] * factor:.3g}") for factor in factors]


def main() -> None:
    """Read the images, run what is asked for and not done yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder with train/CLASS and test/CLASS")
    parser.add_argument("--pruned", type=float, nargs="*", default=[0.3, 0.5, 0.7], help="shares of the channels")
    parser.add_argument("--rows", type=int, help="images to train on; by default all but the 500 that validate")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3, help="seeds at the best rate (default: 3)")
    parser.add_argument(
        "--factors", type=float, nargs="*", default=[1, 4, 16, 64], help="on each default learning rate"
    )
    parser.add_argument("--only", nargs="*", choices=CONTENDERS, default=[*CONTENDERS], metavar="NAME")
    parser.add_argument("--bf16", action="store_true", help="multiply in bf16: fast on a CPU that has AMX")
    parser.add_argument("--output", type=Path, default=Path("runs/prune-channels/results.jsonl"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    parts = resnet20.read_parts(asked.images, asked.rows)
    pairs = [(pruned, own) for pruned in asked.pruned for own in asked.only if pruned or "SPLoRA" in own]
    names = [f"{100 * pruned:.0f}% pruned, {own}" for pruned, own in pairs]
    rates = {name: rates_of(name, asked.factors) for name in names}
    lines = resnet20.search(
        asked.output, rates, asked.seeds, lambda name, rate, seed: measured(name, rate, seed, asked, parts)
    )
    counts = [len(images[1]) for images in parts]
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread;", end=" ")
    print("{} images to train on, {} to choose rates by, {} to test on;".format(*counts), end=" ")
    print(f"as it is: {accuracy(pretrained(), parts.test):.1%}\n")
    print(table(lines))


if __name__ == "__main__":
    main()
