"""Prune the inner channels of a pretrained ResNet-20 while adapters train, and write what is left of it as a table.

    python examples/prune-channels/prune_channels.py path/to/images

The folder has train/CLASS/*.jpg and test/CLASS/*.jpg, images of CIFAR-10 of 32 x 32 pixels; the network is the one
that the tests use (tests/data/resnet20, trained on CIFAR-10). "none" prunes at once, by the same norms, and trains
nothing. In all others batch norms train in full beside the adapters, so that their statistics are those of the pruned
network; "batch norms alone" keeps B A at zero, and 0 % pruned is what adapting to these images gives by itself. Rates
are not searched: all have their method's default, or a multiple of it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import isotune

WEIGHTS = Path(__file__).parents[2] / "tests/data/resnet20/model.safetensors"
INNER = r"layer\d\.\d\.conv\d"
NORMS = [f"layer{k}.{n}.bn{i}" for k in (1, 2, 3) for n in range(3) for i in (1, 2)]
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CONTENDERS = {
    "none": "splora",
    "batch norms alone": "splora",
    "SPLoRA, r = 8, and batch norms": "splora",
    "SPPaRA and batch norms": "sppara",
}
"""Each with the method that leaves channels out."""
Images = tuple[Tensor, Tensor]


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


def pretrained() -> ResNet20:
    """The network with its weights, in evaluation mode."""
    model = ResNet20()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()


def read_images(folder: Path) -> Images:
    """Images (n, 3, 32, 32), normalised, and their classes (n), which are the folders in alphabetical order."""
    pixels, classes = [], []
    for label, path in enumerate(sorted(p for p in folder.iterdir() if p.is_dir())):
        for file in sorted(path.iterdir()):
            pixels.append(np.asarray(Image.open(file).convert("RGB"), dtype=np.float32) / 255)
            classes.append(label)
    values = (np.stack(pixels) - np.array(MEAN, np.float32)) / np.array(DEVIATION, np.float32)
    return torch.from_numpy(values.astype(np.float32)).permute(0, 3, 1, 2).contiguous(), torch.tensor(classes)


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Share of the images whose class the model finds, in evaluation mode."""
    model.eval()
    found = torch.cat([model(x).argmax(1) for x in images[0].split(250)])
    return float((found == images[1]).float().mean())


def train(model: nn.Module, images: Images, epochs: int, rate: float, seed: int) -> None:
    """Batches of 64, mirrored at random, AdamW with a rate that falls to zero; what trains in full has its mode."""
    draw, batch = torch.Generator().manual_seed(seed), 64
    optimizer = torch.optim.AdamW(isotune.parameter_groups(model, lr=rate))
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
        x = images[0][chosen]
        mirrored = torch.rand(len(x), generator=draw) < 0.5
        x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
        optimizer.zero_grad()
        F.cross_entropy(model(x), images[1][chosen]).backward()
        optimizer.step()
        falling.step()
        isotune.after_step(model, (step + 1) / steps, optimizer)


def one(name: str, keep: float, seed: int, asked: argparse.Namespace, parts: tuple[Images, Images]) -> dict[str, Any]:
    """Prune, with a training or without, make the network smaller, and measure it."""
    settings = isotune.method(CONTENDERS[name], keep=keep, **({"rank": 8} if CONTENDERS[name] == "splora" else {}))
    norms = () if name == "none" else NORMS
    model = isotune.adapt(pretrained(), settings, INNER, train_also=norms, seed=seed)
    for path, parameter in model.named_parameters():
        if name in ("none", "batch norms alone") and ".bn" not in path:
            parameter.requires_grad_(False)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    began = time.perf_counter()
    if trained:
        train(model, parts[0], asked.epochs, asked.rate * settings.learning_rate, seed)
    isotune.after_step(model)
    seconds, masked = time.perf_counter() - began, accuracy(model, parts[1])
    before = sum(p.numel() for p in pretrained().parameters())
    after = isotune.slim(model).after if keep < 1 else before
    slim = accuracy(model, parts[1])
    assert abs(slim - masked) <= 1 / len(parts[1][1]), (slim, masked)  # one image may be at the edge of two classes
    return {
        "pruned": round(1 - keep, 2), "with": name, "seed": seed, "accuracy": slim, "before": before,
        "weights": after, "trained": trained, "seconds": seconds,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, a line for each share and contender, with means and deviations over seeds."""
    lines = ["| channels pruned | with | weights left | trained | accuracy |", "| ---: | --- | ---: | ---: | ---: |"]
    for pruned, name in dict.fromkeys((row["pruned"], row["with"]) for row in rows):
        own = [row for row in rows if (row["pruned"], row["with"]) == (pruned, name)]
        scores = [100 * row["accuracy"] for row in own]
        spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
        left, trained = f"{own[0]['weights'] / own[0]['before']:.1%}", f"{own[0]['trained']:,}"
        lines.append(f"| {pruned:.0%} | {name} | {left} | {trained} | {statistics.mean(scores):.1f} %{spread} |")
    return "\n".join(lines)


def main() -> None:
    """Read the images, run all that is asked for, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder with train/CLASS and test/CLASS")
    parser.add_argument(
        "--pruned", type=float, nargs="*", default=[0.0, 0.3, 0.5, 0.7], help="shares of the channels"
    )
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rate", type=float, default=1.0, help="factor on each method's default learning rate")
    parser.add_argument(
        "--only", nargs="*", default=list(CONTENDERS)[:3], help="contenders, by their names in the table"
    )
    parser.add_argument("--output", type=Path, help="a file of JSON lines, a run each")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    parts = read_images(asked.images / "train"), read_images(asked.images / "test")
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, one thread;", end=" ")
    print(f"{len(parts[0][1])} images to train on, {len(parts[1][1])} to test", end="; ")
    print(f"as it is: {accuracy(pretrained(), parts[1]):.1%}")
    rows = []
    for seed in range(asked.seeds):
        for pruned in asked.pruned:
            for name in [n for n in asked.only if (pruned or "SPLoRA" in n) and (seed == 0 or n != "none")]:
                rows.append(one(name, 1 - pruned, seed, asked, parts))
                print(json.dumps(rows[-1]), flush=True)
                if asked.output:
                    asked.output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(table(rows))


if __name__ == "__main__":
    main()
