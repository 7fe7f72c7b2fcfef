"""What all runs start from, made once and kept in the output folder: the base model, the judge, prior pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusion import denoising_loss, sample, train
from looks import IDENTIFIERS, SUBJECTS, Judge, Pictures, prompts, read, train_judge
from torch import Tensor
from unet import UNet

BATCH, RATE, SEED = 48, 2e-3, 0


class Base:
    """The U-Net that makes plain digits, by its weights, with the pictures and the judge."""

    def __init__(self, weights: dict[str, Tensor], judge: Judge, prior: dict[int, Tensor]) -> None:
        self.weights, self.judge, self.prior = weights, judge, prior
        """`prior`: for each subject's digit, 100 pictures that the base model made of it."""
        self.train_on, self.test_on = read()

    def model(self) -> UNet:
        """A fresh copy of the base model."""
        model = UNet()
        model.load_state_dict(self.weights)
        return model


def open_base(folder: Path, steps: int, judge_steps: int) -> Base:
    """The base in the folder, trained first where there is none."""
    file = folder / f"base-{steps}-{judge_steps}.pt"
    if not file.exists():
        pictures, _ = read()
        judge = train_judge(pictures, judge_steps)
        model = pretrained(pictures, steps)
        prior = {s.digit: sample(model, prompts([s.digit] * 100), SEED) for s in SUBJECTS}
        torch.save({"model": model.state_dict(), "judge": judge.state_dict(), "prior": prior}, file)
    found = torch.load(file, weights_only=True)
    judge = Judge().eval()
    judge.load_state_dict(found["judge"])
    return Base(found["model"], judge, found["prior"])


def pretrained(pictures: Pictures, steps: int) -> UNet:
    """The U-Net after `steps` batches of plain digits; a fifth of the prompts have an identifier."""
    torch.manual_seed(SEED)
    model, draw = UNet(), torch.Generator().manual_seed(SEED)

    def loss() -> Tensor:
        rows = torch.randint(len(pictures.x), (BATCH,), generator=draw)
        prompt = prompts(pictures.digits[rows])
        drawn = torch.tensor(IDENTIFIERS)[torch.randint(2, (BATCH,), generator=draw)]
        prompt[:, 0] = torch.where(torch.rand(BATCH, generator=draw) < 0.2, drawn, prompt[:, 0])
        return denoising_loss(model, pictures.x[rows], prompt, draw)

    train(model, loss, steps, RATE, "base model")
    return model.eval()
