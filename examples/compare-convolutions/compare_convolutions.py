"""Adapters on the convolutions of a pretrained ResNet-20, side by side on images that it has not seen the like of.

    python examples/compare-convolutions/compare_convolutions.py path/to/images

The folder has train/CLASS/*.jpg and test/CLASS/*.jpg, images of CIFAR-10 of 32 x 32 pixels; the network is the one
that the tests use (tests/data/resnet20, trained on CIFAR-10). The task is the same images with their colours
inverted. Each method has the size that comes nearest to the budget, and tries the same number of learning rates once
each, of which the validation rows choose; what is reported is seen on test images, over seeds that took no part in
that. "kept" is what the adapted network finds of the test images in their own colours, with its adapter on: with
isotune.disabled it is the base again.

Adapters go on all 19 convolutions, and batch norms stay as they are, statistics included; they train in the rows
that name them, and in full fine-tuning. Results are written run by run, and the same command goes on where it
was.
"""

from __future__ import annotations

import argparse
import functools
import platform
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import isotune
from isotune.adapters.budget import nearest_to
from isotune.intervals import Interval, paired
from isotune.sites import site_of

sys.path.insert(0, str(Path(__file__).parents[1]))
import resnet20
from resnet20 import Images, Line, Parts, accuracy, pretrained

METHODS = ("lora", "dora", "loha", "lokr", "hra", "oft", "boft", "ssf")
"""On all convolutions, at the budget; ssf has one size, a factor for each output."""
BESIDE = " and batch norms"
NORMED = tuple(method + BESIDE for method in ("lora", "hra"))
"""The same, while the batch norms train at the same rate, beside the budget."""
TRAINED = {"batch norms": nn.BatchNorm2d, "full fine-tuning": nn.Module}
"""What trains without an adapter. Batch norms that train follow the statistics of the new images, too."""
FROZEN, BASELINE = "frozen base", "lora"
FACTORS = (0.5, 1, 2, 4, 8)
"""Multiples of a first rate for each."""
STARTS = {
    "lora": 2e-3, "dora": 1e-3, "loha": 5e-3, "lokr": 5e-3, "ssf": 5e-3,
    "hra": 3e-3, "oft": 1e-3, "boft": 1e-3, "batch norms": 1e-2, "full fine-tuning": 2e-3,
}  # fmt: skip
"""The first rates: the methods' defaults when the page's runs were made, and steps were not divided for depth."""


def inverted(images: Images) -> Images:
    """The same with inverted colours: each value v of 0 to 1 becomes 1 - v."""
    middle = (1 - 2 * torch.tensor(resnet20.MEAN)) / torch.tensor(resnet20.DEVIATION)
    return (middle[:, None, None] - images[0]).contiguous(memory_format=torch.channels_last), images[1]


@functools.cache
def settings_of(name: str, budget: int) -> isotune.Settings:
    """The method, of the size on the convolutions that comes nearest to `budget` parameters."""
    layers = [(path, layer) for path, layer in pretrained().named_modules() if isinstance(layer, nn.Conv2d)]
    return nearest_to(budget, isotune.method(name.removesuffix(BESIDE)), {p: site_of(layer) for p, layer in layers})


def prepared(name: str, rate: float, seed: int, budget: int) -> tuple[nn.Module, Iterable[Any], dict[str, Any]]:
    """The network, what AdamW gets of it, and the options."""
    model = pretrained()
    if name in TRAINED:
        model.requires_grad_(False)
        for module in model.modules():
            if isinstance(module, TRAINED[name]):
                module.requires_grad_(True)
        return model, [{"params": [p for p in model.parameters() if p.requires_grad], "lr": rate}], {}
    settings = settings_of(name, budget)
    also = [path for path, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and name in NORMED]
    isotune.adapt(model, settings, lambda _, layer: isinstance(layer, nn.Conv2d), train_also=also, seed=seed)
    return model, isotune.parameter_groups(model, lr=rate), settings.model_dump(exclude_unset=True)


def measured(name: str, rate: float, seed: int, asked: argparse.Namespace, old: Parts, new: Parts) -> Line:
    """Train, and see what is right afterwards; of a trial (seed 0), on the validation rows alone."""
    line: Line = {"options": {}, "parameters": 0, "seconds": 0.0}
    model, bf16 = pretrained(), asked.bf16
    if name != FROZEN:
        model, groups, line["options"] = prepared(name, rate, seed, asked.budget)
        line["parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        line["seconds"] = round(resnet20.train(model, new.train, asked.epochs, groups, seed, bf16), 1)
    line["validation"] = accuracy(model, new.validation, bf16)
    if seed == 0:
        return line
    return line | {"test": accuracy(model, new.test, bf16), "kept": accuracy(model, old.test, bf16)}


def table(lines: list[Line], rows: int) -> str:
    """The lines as Markdown, a row a contender, best first: means with 95 % t-intervals, over `rows` test images."""
    found = {}
    for line in lines:
        found.setdefault(line["name"], []).append(line)
    scores = {name: {line["seed"]: 100 * line["test"] for line in own} for name, own in found.items()}
    kept = {name: Interval.of([100 * line["kept"] for line in own]) for name, own in found.items()}
    titles = ["method", "parameters", "rate", "accuracy", f"minus {BASELINE}", "kept"]
    text = [_row(titles), _row(["---", *["---:"] * 5])]
    for name in sorted(found, key=lambda name: -statistics.fmean(scores[name].values())):
        line, difference = found[name][0], ""
        if name != BASELINE and BASELINE in scores:
            shares = [{seed: s / 100 for seed, s in scores[one].items()} for one in (name, BASELINE)]
            if (gap := paired(*shares, rows)) is not None:
                difference = f"{100 * gap.mean:+.1f} ± {100 * (gap.half_width or 0):.1f}"
        options = ", ".join(f"{option}={value}" for option, value in line["options"].items())
        rate = "" if name == FROZEN else f"{line['rate']:.4g}{' (edge)' if resnet20.at_an_edge(line) else ''}"
        score = Interval.of(list(scores[name].values()))
        title, count = f"{name} {options}".strip(), f"{line['parameters']:,}"
        text.append(_row([title, count, rate, _shown(score), difference, _shown(kept[name])]))
    return "\n".join(text)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _shown(found: Interval) -> str:
    return f"{found.mean:.1f} ± {found.half_width:.1f}" if found.half_width else f"{found.mean:.1f}"


def rates_of(names: list[str]) -> dict[str, list[float]]:
    """The rates that each tries; the frozen base has none."""
    found = {FROZEN: [0.0]} if FROZEN in names else {}
    for name in [name for name in names if name != FROZEN]:
        found[name] = [float(f"{STARTS[name.removesuffix(BESIDE)] * factor:.3g}") for factor in FACTORS]
    return found


def main() -> None:
    """Read the images, run what is asked for and not done yet, and print the table."""
    every = [FROZEN, *METHODS, *NORMED, *TRAINED]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder with train/CLASS and test/CLASS")
    parser.add_argument("--rows", type=int, help="images to train on; by default all but the 500 that validate")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3, help="seeds at the best rate (default: 3)")
    parser.add_argument("--budget", type=int, default=25_000, help="trained parameters, about (default: 25000)")
    parser.add_argument("--only", nargs="*", choices=every, default=every, metavar="NAME", help=", ".join(every))
    parser.add_argument("--bf16", action="store_true", help="multiply in bf16: fast on a CPU that has AMX")
    parser.add_argument("--output", type=Path, default=Path("runs/compare-convolutions/results.jsonl"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    old = resnet20.read_parts(asked.images, asked.rows)
    new = Parts(*map(inverted, old))
    lines = resnet20.search(
        asked.output,
        rates_of(asked.only),
        asked.seeds,
        lambda name, rate, seed: measured(name, rate, seed, asked, old, new),
    )
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread;", end=" ")
    counts = [len(images[1]) for images in new]
    print("{} images to train on, {} to choose rates by, {} to test on\n".format(*counts))
    print(table(lines, counts[2]))


if __name__ == "__main__":
    main()
