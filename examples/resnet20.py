"""What the examples on convolutions have in common: a ResNet-20, its images, its training, and a search over rates.

The network is the one that the tests use (tests/data/resnet20, trained on CIFAR-10). Images are in a folder with
train/CLASS/*.jpg and test/CLASS/*.jpg, of 32 x 32 pixels.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import isotune

WEIGHTS = Path(__file__).parents[1] / "tests/data/resnet20/model.safetensors"
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VALIDATION = 500
"""Rows of the training images that choose rates and train nothing, the same ones under every seed."""
Images = tuple[Tensor, Tensor]
Line = dict[str, Any]


class Block(nn.Module):
    """Two 3 x 3 convolutions and a shortcut without parameters."""

    def __init__(self, n_in: int, n_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(n_out)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(n_out)
        self.stride, self.more = stride, n_out - n_in

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(shortcut, (0, 0, 0, 0, self.more // 2, self.more - self.more // 2)))


class ResNet20(nn.Module):
    """The CIFAR-10 network of He et al. 2016 with n = 3."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(Block(16, 16, 1), Block(16, 16, 1), Block(16, 16, 1))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


class Parts(NamedTuple):
    """The images to train on, to choose rates on, and to test on."""

    train: Images
    validation: Images
    test: Images


def pretrained() -> ResNet20:
    """The network with its weights, in evaluation mode."""
    model = ResNet20()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval().to(memory_format=torch.channels_last)  # faster on a CPU


def read_parts(folder: Path, rows: int | None = None) -> Parts:
    """The images under `folder`, drawn once and for all: `rows` of them to train on, or all that do not validate."""
    every, test = read_images(folder / "train"), read_images(folder / "test")
    order = torch.randperm(len(every[1]), generator=torch.Generator().manual_seed(0))
    held, own = order[:VALIDATION], order[VALIDATION:][:rows]
    return Parts((every[0][own], every[1][own]), (every[0][held], every[1][held]), test)


def read_images(folder: Path) -> Images:
    """Images (n, 3, 32, 32), normalised, and their classes (n), which are the folders in alphabetical order."""
    pixels, classes = [], []
    for label, path in enumerate(sorted(p for p in folder.iterdir() if p.is_dir())):
        for file in sorted(path.iterdir()):
            pixels.append(np.asarray(Image.open(file).convert("RGB"), dtype=np.float32) / 255)
            classes.append(label)
    values = (np.stack(pixels) - np.array(MEAN, np.float32)) / np.array(DEVIATION, np.float32)
    images = torch.from_numpy(values.astype(np.float32)).permute(0, 3, 1, 2)
    return images.contiguous(memory_format=torch.channels_last), torch.tensor(classes)


@torch.no_grad()
def accuracy(model: nn.Module, images: Images, bf16: bool = False) -> float:
    """Share of the images whose class the model finds, in evaluation mode."""
    model.eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        found = torch.cat([model(x).argmax(1) for x in images[0].split(250)])
    return float((found == images[1]).float().mean())


def train(
    model: nn.Module, images: Images, epochs: int, groups: Iterable[Any], seed: int, bf16: bool = False
) -> float:
    """Batches of 64, mirrored at random, AdamW with rates that fall to zero; gives the seconds that it took.

    `groups` is what AdamW takes, with the rates. Batch norms that train follow the batches' statistics, too.
    """
    draw, batch, began = torch.Generator().manual_seed(seed), 64, time.perf_counter()
    optimizer = torch.optim.AdamW(groups)
    steps = epochs * (len(images[1]) // batch)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 - k / steps)
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and any(p.requires_grad for p in module.parameters(recurse=False)):
            module.train()
    for step in range(steps):
        if step % (steps // epochs) == 0:
            order = torch.randperm(len(images[1]), generator=draw).split(batch)
        chosen = order[step % (steps // epochs)]
        mirrored = torch.rand(len(chosen), generator=draw) < 0.5
        x = images[0][chosen]
        x = torch.where(mirrored[:, None, None, None], x.flip(-1), x).contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):  # anew each step: it keeps what it has cast
            loss = F.cross_entropy(model(x), images[1][chosen])
        loss.backward()
        optimizer.step()
        falling.step()
        isotune.after_step(model, (step + 1) / steps, optimizer)
    return time.perf_counter() - began


def search(
    log: Path, rates: Mapping[str, Sequence[float]], seeds: int, run: Callable[[str, float, int], Line]
) -> list[Line]:
    """Each contender once at each of its rates with seed 0, then at the best of them with seeds 1, 2, ...

    Args:
        log: A file of JSON lines, a run each; what is in it already is not run again.
        rates: Of each contender the rates that are tried; one that has a single rate is not searched for.
        seeds: How many seeds are compared; none of them takes part in the search.
        run: Of a contender, a rate and a seed, the line of the run, with "validation", by which rates are chosen.

    Returns:
        The lines of the seeds, each with `tried`: the score on the validation rows by rate.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    done = {_key(line): line for line in map(json.loads, log.read_text().splitlines())} if log.exists() else {}
    count, position = sum(seeds + len(own) * (len(own) > 1) for own in rates.values()), itertools.count(1)

    def once(name: str, rate: float, seed: int) -> Line:
        place = next(position)
        if (name, rate, seed) not in done:
            line = {"name": name, "rate": rate, "seed": seed, **run(name, rate, seed)}
            done[_key(line)] = line
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")
            score = f"{line['validation']:.1%} of the validation rows"
            print(f"{place} of {count}: {name}, rate {rate:g}, seed {seed}: {score}", file=sys.stderr, flush=True)
        return done[name, rate, seed]

    found = []
    for name, own in rates.items():
        tried = {rate: once(name, rate, 0)["validation"] for rate in own} if len(own) > 1 else {}
        best = max(tried, key=tried.__getitem__) if tried else own[0]
        found += [once(name, best, seed) | {"tried": tried} for seed in range(1, seeds + 1)]
    return found


def _key(line: Line) -> tuple[str, float, int]:
    return line["name"], line["rate"], line["seed"]


def at_an_edge(line: Line) -> bool:
    """Whether the rate that was chosen is the first or the last of those tried."""
    return bool(line["tried"]) and line["rate"] in (min(line["tried"]), max(line["tried"]))
