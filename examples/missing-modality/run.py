"""A network that was trained on images with sound, where one of the two is missing: small adapters for each case.

    python examples/missing-modality/make_features.py path/to/images features.safetensors
    python examples/missing-modality/run.py features.safetensors --output results.json

A small network reads what two frozen encoders made of an image and of a word in noise, and says which of ten things
is meant. It learns with both, and is frozen. Where one is missing, zeros (the mean of each feature) are in its place,
and the network does worse than one that never had it. How much of that do a few numbers get back: a scale and a shift
for the outputs of each layer (ssf), or a LoRA, one set of them for each modality that may be missing?

Beside them: a whole network of the same form for each case, trained on nothing else, and one for all cases, which
lacked either modality in a third of the rows that it learned from. Everything that is trained may choose among three
rates by validation rows, for each seed. Test rows of all cases stand in one batch, of which every row takes the
adapters that it needs; the script stops if that gave something else than a batch for each case.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor, nn

import isotune

CASES = {"both": (1.0, 1.0), "image alone": (1.0, 0.0), "sound alone": (0.0, 1.0)}
"""What is there of the image and of the sound."""
BOTH = "both"
ONE_MISSING = [case for case in CASES if case != BOTH]
METHODS = {"ssf for each case": isotune.method("ssf"), "LoRA for each case": isotune.LoRA(rank=2)}
LAYERS = ["image", "sound", "first", "second"]
NETWORK_RATES, ADAPTER_RATES = (1e-3, 3e-3, 1e-2), (1e-3, 5e-3, 2e-2)
EPOCHS, ROWS, WIDTH, DROPOUT = 12, 128, 64, 0.3
T = TypeVar("T")


@dataclass(frozen=True)
class Data:
    """Features of images (n, 64) and of sounds (n, 384), and classes (n)."""

    image: Tensor
    sound: Tensor
    label: Tensor

    def __getitem__(self, rows: Any) -> Data:
        return Data(self.image[rows], self.sound[rows], self.label[rows])

    def __len__(self) -> int:
        return len(self.label)

    def lacking(self, cases: list[str]) -> Data:
        """The same rows with zeros for what is missing in the case of each."""
        there = torch.tensor([CASES[case] for case in cases])
        return Data(self.image * there[:, :1], self.sound * there[:, 1:], self.label)


def read(file: Path) -> dict[str, Data]:
    """Training, validation and test rows; each feature has mean 0 and deviation 1 over the training rows."""
    tensors = load_file(file)
    scaled = {}
    for split in ("train", "validation", "test"):
        for what in ("image", "sound"):
            base = tensors[f"train.{what}"]
            scaled[f"{split}.{what}"] = (tensors[f"{split}.{what}"] - base.mean(0)) / (base.std(0) + 1e-6)
    return {
        split: Data(scaled[f"{split}.image"], scaled[f"{split}.sound"], tensors[f"{split}.label"])
        for split in ("train", "validation", "test")
    }


class Fusion(nn.Module):
    """A layer for each modality, two for both together, and the classes."""

    def __init__(self, image: int, sound: int, classes: int) -> None:
        super().__init__()
        self.image, self.sound = nn.Linear(image, WIDTH), nn.Linear(sound, WIDTH)
        self.first, self.second = nn.Linear(2 * WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, 2 * WIDTH)
        self.head = nn.Linear(2 * WIDTH, classes)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, image: Tensor, sound: Tensor) -> Tensor:
        """Logits (n, classes) of image (n, 64) and sound (n, 384)."""
        h = torch.cat([self.image(image), self.sound(sound)], dim=-1)
        h = self.first(self.dropout(torch.relu(h)))
        return self.head(self.dropout(torch.relu(self.second(self.dropout(torch.relu(h))))))


def fit(model: nn.Module, data: Data, groups: Any, cases: list[str], seed: int) -> None:
    """AdamW at a rate that falls to zero; every row is in a case that is drawn anew each time among those given."""
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(groups)
    steps = EPOCHS * (len(data) // ROWS)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    model.train()
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(data), generator=draw)[: len(data) // ROWS * ROWS].split(ROWS):
            drawn = torch.randint(len(cases), (len(rows),), generator=draw).tolist()
            batch = data[rows].lacking([cases[i] for i in drawn])
            nn.functional.cross_entropy(model(batch.image, batch.sound), batch.label).backward()
            optimizer.step()
            optimizer.zero_grad()
            falling.step()


@torch.no_grad()
def accuracy(model: nn.Module, data: Data, case: str) -> float:
    """The share of rows that are classified right in this case, in percent."""
    model.eval()
    batch = data.lacking([case] * len(data))
    return 100 * float((model(batch.image, batch.sound).argmax(-1) == batch.label).float().mean())


def best(rates: tuple[float, ...], make: Callable[[float], T], score: Callable[[T], float]) -> T:
    """What the rate with the highest score made."""
    return max((make(rate) for rate in rates), key=score)


def network(data: Mapping[str, Data], cases: list[str], seed: int) -> Fusion:
    """A network that learned from rows in these cases, from nothing."""
    train = data["train"]

    def make(rate: float) -> Fusion:
        torch.manual_seed(seed)
        model = Fusion(train.image.shape[1], train.sound.shape[1], int(train.label.max()) + 1)
        fit(model, train, [{"params": model.parameters(), "lr": rate}], cases, seed)
        return model

    def score(model: Fusion) -> float:
        return statistics.mean(accuracy(model, data["validation"], case) for case in cases)

    return best(NETWORK_RATES, make, score)


def add_sets(model: nn.Module, method: isotune.Settings, data: Mapping[str, Data], seed: int) -> dict[str, str]:
    """Train adapters for each case in which something is missing; gives their names by case."""
    names = {}
    for case in ONE_MISSING:

        def make(rate: float, case: str = case) -> str:
            name = f"{case} {rate:g}".replace(" ", "-").replace(".", "-")
            isotune.adapt(model, method, LAYERS, name=name, seed=seed)
            isotune.use(model, name)
            torch.manual_seed(seed)
            fit(model, data["train"], isotune.parameter_groups(model, lr=rate), [case], seed)
            return name

        def score(name: str, case: str = case) -> float:
            isotune.use(model, name)
            return accuracy(model, data["validation"], case)

        names[case] = best(ADAPTER_RATES, make, score)
    return names


@torch.no_grad()
def accuracy_by_row(model: nn.Module, data: Data, names: Mapping[str, str], seed: int) -> dict[str, float]:
    """The accuracy in each case, from one batch of all cases in which every row has the adapters that it needs.

    `names` says which, by case; rows of other cases have the frozen model. Raises RuntimeError where a batch of one
    case gives other logits than its rows in the batch of all.
    """
    model.eval()
    order = torch.randperm(len(CASES) * len(data), generator=torch.Generator().manual_seed(seed))
    cases = [case for case in CASES for _ in range(len(data))]
    cases = [cases[i] for i in order.tolist()]
    batch = data[order % len(data)].lacking(cases)
    isotune.use(model, rows=[names.get(case) for case in cases])
    logits = model(batch.image, batch.sound)
    found = {}
    for case in CASES:
        rows = torch.tensor([other == case for other in cases])
        own = batch[rows]
        if case in names:
            isotune.use(model, names[case])
            alone = model(own.image, own.sound)
        else:
            with isotune.disabled(model):
                alone = model(own.image, own.sound)
        if not torch.allclose(logits[rows], alone, rtol=1e-4, atol=1e-4):
            raise RuntimeError(f"{case}: rows of a mixed batch differ from a batch of their own")
        found[case] = 100 * float((logits[rows].argmax(-1) == own.label).float().mean())
    return found


def one(data: Mapping[str, Data], seed: int) -> list[dict[str, Any]]:
    """Train and measure all ways from one seed: by way and case the accuracy on test rows."""
    test = data["test"]
    base = network(data, [BOTH], seed)
    size = sum(p.numel() for p in base.parameters())
    found = [{"way": "trained with both", "numbers": 0, **{case: accuracy(base, test, case) for case in CASES}}]
    for way, method in METHODS.items():
        model = Fusion(test.image.shape[1], test.sound.shape[1], base.head.out_features)
        model.load_state_dict(base.state_dict())
        names = add_sets(model, method, data, seed)
        isotune.use(model, names[ONE_MISSING[0]])
        numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
        found.append({"way": way, "numbers": numbers, **accuracy_by_row(model, test, names, seed)})
    whole = network(data, list(CASES), seed)
    found.append(
        {"way": "one network for all cases", "numbers": size} | {case: accuracy(whole, test, case) for case in CASES}
    )
    own = {case: accuracy(network(data, [case], seed), test, case) for case in ONE_MISSING}
    found.append({"way": "a network for each case", "numbers": size, BOTH: found[0][BOTH], **own})
    return [{"seed": seed, **row} for row in found]


def said(scores: list[float]) -> str:
    """Mean and half the width of Student's interval of 95 %."""
    t = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}.get(len(scores))
    if t is None:
        return f"{statistics.mean(scores):.1f}"
    return f"{statistics.mean(scores):.1f} ± {t * statistics.stdev(scores) / len(scores) ** 0.5:.1f}"


def table(rows: list[dict[str, Any]]) -> str:
    """The results by way and case, in Markdown."""
    lines = [f"| way | numbers for a case | {', % | '.join(CASES)}, % |", "|---|---:|" + "---:|" * len(CASES)]
    for way in dict.fromkeys(row["way"] for row in rows):
        own = [row for row in rows if row["way"] == way]
        cells = [said([row[case] for row in own]) for case in CASES]
        lines.append(f"| {way} | {own[0]['numbers']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run every way from every seed, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("features", type=Path, help="What make_features.py wrote.")
    parser.add_argument("--output", type=Path, default=Path("results.json"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    options = parser.parse_args()
    data = read(options.features)
    rows = [row for seed in track(options.seeds, "seeds") for row in one(data, seed)]
    options.output.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
