"""Denoising diffusion: a picture x becomes `cos(t π/2) x + sin(t π/2) noise`, and a U-Net finds the noise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

import isotune

LAST = 0.99
"""The time at which sampling starts from noise alone."""


def parts(t: Tensor) -> tuple[Tensor, Tensor]:
    """How much there is of the picture and of the noise at the times t (n), each (n, 1, 1, 1)."""
    angle = t[:, None, None, None] * math.pi / 2
    return torch.cos(angle), torch.sin(angle)


def denoising_loss(
    model: nn.Module, x: Tensor, prompt: Tensor, draw: torch.Generator, outline: Tensor | None = None
) -> Tensor:
    """The mean square error of the noise found in x (n, 1, h, w), at times and with noise from `draw`."""
    t, noise = torch.rand(len(x), generator=draw) * LAST, torch.randn(x.shape, generator=draw)
    picture, rest = parts(t)
    return F.mse_loss(model(with_outline(picture * x + rest * noise, outline), t, prompt), noise)


def with_outline(x: Tensor, outline: Tensor | None) -> Tensor:
    """The U-Net's input: x (n, 1, h, w), and the outline as a second channel where there is one."""
    return x if outline is None else torch.cat([x, outline], 1)


@torch.no_grad()
def sample(model: nn.Module, prompt: Tensor, seed: int, steps: int = 20, outline: Tensor | None = None) -> Tensor:
    """Pictures (n, 1, 8, 8) for prompts (n, k), by DDIM: `steps` steps from noise that the seed decides."""
    model.eval()
    x = torch.randn((len(prompt), 1, 8, 8), generator=torch.Generator().manual_seed(seed))
    times = torch.linspace(LAST, 0, steps + 1)
    for now, then in itertools.pairwise(times):
        (picture, rest), (next_picture, next_rest) = (parts(t.expand(len(x))) for t in (now, then))
        noise = model(with_outline(x, outline), now.expand(len(x)), prompt)
        clean = ((x - rest * noise) / picture).clamp(-1, 1)
        x = next_picture * clean + next_rest * (x - picture * clean) / rest
    return x


def train(model: nn.Module, loss: Callable[[], Tensor], steps: int, rate: float, shown: str = "") -> None:
    """AdamW on what trains, its rate rising for a tenth of the steps and then falling; a bar where it has a name."""
    model.train()
    optimizer = torch.optim.AdamW(isotune.parameter_groups(model, lr=rate))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min((k + 1) / (0.1 * steps + 1), 0.5 + 0.5 * math.cos(math.pi * k / steps))
    )
    for step in track(range(steps), shown, transient=True, disable=not shown):
        optimizer.zero_grad()
        (loss() + isotune.penalty(model)).backward()
        optimizer.step()
        schedule.step()
        isotune.after_step(model, (step + 1) / steps, optimizer)
