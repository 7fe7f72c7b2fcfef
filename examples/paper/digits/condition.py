"""A condition: pictures that follow a given outline, which comes in through a convolution that trains in full."""

from __future__ import annotations

import time
from functools import partial

import torch
from base import Base
from contenders import (
    ALONE,
    FULL,
    RATES,
    SEARCH_SEED,
    SIZES,
    Asked,
    Made,
    Results,
    Row,
    best_rates,
    settings_for,
    trained_numbers,
)
from diffusion import denoising_loss, sample, train
from looks import Pictures, outlines, prompts
from torch import Tensor, nn
from unet import ATTENTION_AND_MLP, OutlineInput, UNet

import isotune

METHODS = ("hra", "lora", "oft", FULL)
BATCH, CHOOSE = 20, 100
"""Rows of a step; test pictures by which a rate is chosen, the others are for the report."""


def prepared(base: Base, method: str, seed: int) -> UNet:
    """The base model with a layer that reads outlines, which trains in full, and the method's adapter."""
    model = base.model()
    model.conv_in = OutlineInput(model.conv_in)
    if method in SIZES:
        isotune.adapt(model, settings_for(method), ATTENTION_AND_MLP, train_also=["conv_in.outline"], seed=seed)
    else:
        model.requires_grad_(method == FULL).words.requires_grad_(False)
        model.conv_in.outline.requires_grad_(True)
    return model


def learn(model: nn.Module, base: Base, steps: int, rate: float, seed: int) -> None:
    """Batches of training pictures, each beside its own outline."""
    draw, known = torch.Generator().manual_seed(seed), base.train_on

    def loss() -> Tensor:
        rows = torch.randint(len(known.x), (BATCH,), generator=draw)
        x = known.x[rows]
        return denoising_loss(model, x, prompts(known.digits[rows]), draw, outlines(x))

    train(model, loss, steps, rate)


def measured(model: nn.Module, base: Base, real: Pictures, asked: Asked, seed: int) -> tuple[Row, Made]:
    """How pictures made for the outlines and digits of real ones agree with them."""
    given = outlines(real.x)
    reads = given if isinstance(model.conv_in, OutlineInput) else None
    made = sample(model, prompts(real.digits), seed, asked.sampling_steps, reads)
    row: Row = {
        "iou": overlap(outlines(made), given),
        "error": float((made - real.x).abs().mean() / 2),
        "digit": base.judge.share(made, real.digits, 0),
    }
    return {**row, "score": row["iou"]}, {"made": made}


def overlap(ours: Tensor, given: Tensor) -> float:
    """Pixels that both outlines (n, 1, 8, 8) have, over those that either has: the mean over pictures."""
    both, either = (torch.flatten(f(ours, given), 1).sum(1) for f in (torch.minimum, torch.maximum))
    return float((both / either.clamp(min=1)).mean())


def run(base: Base, asked: Asked, results: Results) -> None:
    """Each method's rate by the first test pictures; then, seed by seed, the base and all methods by the others."""
    few = min(CHOOSE, 4 * asked.samples)
    choose, report = Pictures(base.test_on.x[:few], base.test_on.digits[:few]), reported(base, asked)
    methods = (ALONE, *(method for method in METHODS if method in asked.methods))

    def make(method: str, multiple: float, seed: int, real: Pictures) -> Row:
        key = f"condition/{method}/x{multiple:g}/{seed}"
        return results.get(key, lambda: one(base, method, multiple, seed, real, asked))

    best = best_rates(methods, asked.rates, lambda method, multiple: make(method, multiple, SEARCH_SEED, choose))
    for seed in range(1, asked.seeds + 1):
        bare = partial(measured, base.model(), base, report, asked, seed)
        results.get(f"condition/base/{seed}", bare)
        for method in methods:
            make(method, best[method], seed, report)


def reported(base: Base, asked: Asked) -> Pictures:
    """The test pictures of the report, at most four for each picture of a subject."""
    rows = slice(CHOOSE, CHOOSE + 4 * asked.samples)
    return Pictures(base.test_on.x[rows], base.test_on.digits[rows])


def one(base: Base, method: str, multiple: float, seed: int, real: Pictures, asked: Asked) -> tuple[Row, Made]:
    """One training by one method, measured."""
    model, began = prepared(base, method, seed), time.perf_counter()
    numbers = trained_numbers(model)
    learn(model, base, asked.steps, multiple * RATES[method], seed)
    taken = time.perf_counter() - began
    row, made = measured(model, base, real, asked, seed)
    about = {"method": method, "multiple": multiple, "seed": seed, "numbers": numbers}
    return {**about, **row, "seconds": round(taken, 1)}, made
