"""Subjects: a digit in a look of its own, learned from ten pictures under an identifier, as DreamBooth does."""

from __future__ import annotations

import time
from functools import partial

import torch
from base import Base
from contenders import RATES, SEARCH_SEED, Asked, Made, Results, Row, adapted, best_rates, trained_numbers
from diffusion import denoising_loss, sample, train
from looks import BLANK, PLAIN, SUBJECTS, Subject, dressed, prompts
from torch import Tensor, nn

import isotune

PICTURES = 10
ADDED = ("hra", "lora", "oft", "ortha")
"""Methods of which two adapters are put together."""


def learn(model: nn.Module, base: Base, subject: Subject, prior: bool, steps: int, rate: float, seed: int) -> None:
    """Ten pictures of the subject in each step and, to preserve the prior, as many of the base model's plain ones."""
    draw = torch.Generator().manual_seed(seed)
    known = base.train_on.of(subject.digit)
    x = dressed(known[torch.randperm(len(known), generator=draw)[:PICTURES]], subject.look)
    digits = [subject.digit] * PICTURES
    prompt = torch.cat([prompts(digits, subject.word), prompts(digits)]) if prior else prompts(digits, subject.word)

    def loss() -> Tensor:
        rows = torch.randint(len(base.prior[subject.digit]), (PICTURES,), generator=draw)
        both = torch.cat([x, base.prior[subject.digit][rows]]) if prior else x
        return denoising_loss(model, both, prompt, draw)

    train(model, loss, steps, rate)


def measured(model: nn.Module, base: Base, subject: Subject, asked: Asked, seed: int) -> tuple[Row, Made]:
    """What the model makes of the subject, of its digit without the identifier and of other digits, and the pictures.

    `subject`, `edited`, `digit` and `others` are shares of pictures that the judge takes for what was asked for:
    the subject; another digit, with the identifier, in the subject's look; its digit and the others, plain.
    """
    others = [digit for digit in range(10) if digit != subject.digit] * max(1, asked.samples // 16)
    wanted = {
        "subject": ([subject.digit] * asked.samples, subject.word, subject.look),
        "edited": (others, subject.word, subject.look),
        "digit": ([subject.digit] * (asked.samples // 2), BLANK, PLAIN),
        "others": (others, BLANK, PLAIN),
    }
    prompt = torch.cat([prompts(digits, word) for digits, word, _ in wanted.values()])
    made = sample(model, prompt, seed, asked.sampling_steps).split([len(digits) for digits, *_ in wanted.values()])
    groups = dict(zip(wanted, made, strict=True))
    row: Row = {name: base.judge.share(groups[name], digits, look) for name, (digits, _, look) in wanted.items()}
    real = dressed(base.test_on.of(subject.digit), subject.look)
    row |= {"likeness": likeness(base, groups["subject"], real), "diversity": diversity(groups["subject"])}
    row["loss"] = prior_loss(model, base, subject)
    row["score"] = row["subject"] * (row["digit"] + row["others"]) / 2  # 0 for a model that stays as it was
    return row, groups


@torch.no_grad()
def likeness(base: Base, x: Tensor, real: Tensor) -> float:
    """The mean cosine of the judge's features over all pairs of a picture of x (n, 1, 8, 8) and one of `real`."""
    ours, theirs = (torch.nn.functional.normalize(base.judge(pictures)[0], dim=1) for pictures in (x, real))
    return float((ours @ theirs.mT).mean())


def diversity(x: Tensor) -> float:
    """The root mean square difference of the pixels (from 0 to 1) of two pictures of x (n, 1, 8, 8)."""
    flat = x.flatten(1) / 2
    squares = torch.cdist(flat, flat).square() / flat.shape[1]
    return float((squares.sum() / (len(flat) * (len(flat) - 1))).sqrt())


@torch.no_grad()
def prior_loss(model: nn.Module, base: Base, subject: Subject) -> float:
    """The denoising loss of plain test pictures of the other digits, over the base model's; the same noise always."""
    rows = base.test_on.digits != subject.digit
    x, prompt = base.test_on.x[rows], prompts(base.test_on.digits[rows])
    ours, theirs = (
        denoising_loss(m.eval(), x, prompt, torch.Generator().manual_seed(0)) for m in (model, base.model())
    )
    return float(ours / theirs)


def run(base: Base, asked: Asked, results: Results) -> None:
    """Each method's rate; then, seed by seed, base and methods, with the prior and without, and two subjects."""

    def make(method: str, multiple: float, seed: int, prior: bool) -> Row:
        key = f"subject/{method}/x{multiple:g}/{'prior' if prior else 'alone'}/{seed}"
        return results.get(key, lambda: one(base, method, multiple, seed, prior, asked))

    best = best_rates(asked.methods, asked.rates, lambda method, multiple: make(method, multiple, SEARCH_SEED, True))
    for seed in range(1, asked.seeds + 1):
        results.get(f"subject/base/{seed}", partial(measured, base.model(), base, SUBJECTS[0], asked, seed))
        for method in asked.methods:
            make(method, best[method], seed, True)
            make(method, best[method], seed, False)
        for method in (method for method in ADDED if method in asked.methods):
            added = partial(two, base, method, best[method], seed, asked)
            results.get(f"two/{method}/x{best[method]:g}/{seed}", added)


def one(base: Base, method: str, multiple: float, seed: int, prior: bool, asked: Asked) -> tuple[Row, Made]:
    """One subject, learned by one method and measured."""
    rate, began = multiple * RATES[method], time.perf_counter()
    model = adapted(base.model(), method, seed)
    numbers = trained_numbers(model)
    learn(model, base, SUBJECTS[0], prior, asked.steps, rate, seed)
    taken = time.perf_counter() - began
    row, made = measured(model, base, SUBJECTS[0], asked, seed)
    about = {"method": method, "multiple": multiple, "seed": seed, "prior": prior, "numbers": numbers}
    return {**about, **row, "seconds": round(taken, 1)}, made


def two(base: Base, method: str, multiple: float, seed: int, asked: Asked) -> tuple[Row, Made]:
    """Two subjects, each learned by an adapter of its own on the base model, then both adapters at once."""
    rate, model = multiple * RATES[method], base.model()
    names = ("three", "seven")
    row: Row = {"method": method, "multiple": multiple, "seed": seed}
    for slot, (name, subject) in enumerate(zip(names, SUBJECTS, strict=True)):
        adapted(model, method, seed + slot, name, slot)
        learn(model, base, subject, True, asked.steps, rate, seed + slot)
        row[f"{name} alone"] = found(model, base, subject, asked, seed)[0]
    isotune.use(model, *names, train=False)
    made: Made = {}
    for name, subject in zip(names, SUBJECTS, strict=True):
        row[f"{name} of both"], made[name] = found(model, base, subject, asked, seed)
    digits = [*range(10)] * max(1, asked.samples // 16)
    made["plain"] = sample(model, prompts(digits), seed, asked.sampling_steps)
    row["plain"] = base.judge.share(made["plain"], digits, PLAIN)
    return row, made


def found(model: nn.Module, base: Base, subject: Subject, asked: Asked, seed: int) -> tuple[float, Tensor]:
    """The share of pictures, and the pictures, made for a subject that the judge takes for it."""
    digits = [subject.digit] * asked.samples
    made = sample(model, prompts(digits, subject.word), seed, asked.sampling_steps)
    return base.judge.share(made, digits, subject.look), made
