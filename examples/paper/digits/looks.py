"""The digits, the looks they may have, and a classifier that tells digit and look."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

LOOKS = ("plain", "lying", "faint")
PLAIN = 0
BLANK, IDENTIFIERS = 10, (11, 12)
"""Words by their numbers: 0 to 9 are the digits; identifiers, in the blank's place, mean nothing to the base."""


class Subject(NamedTuple):
    """A digit in a look of its own, called by an identifier."""

    digit: int
    look: int
    word: int


SUBJECTS = (Subject(3, 1, IDENTIFIERS[0]), Subject(7, 2, IDENTIFIERS[1]))
"""A three that lies on its side, and a seven in half the ink."""


class Pictures(NamedTuple):
    """Pictures (n, 1, 8, 8) from -1 to 1, and their digits (n)."""

    x: Tensor
    digits: Tensor

    def of(self, digit: int) -> Tensor:
        """Those of one digit."""
        return self.x[self.digits == digit]


def read() -> tuple[Pictures, Pictures]:
    """1,497 pictures to train on and 300 to test with, of the 1,797 that scikit-learn ships."""
    data = load_digits()
    x, digits = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(data.target).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return Pictures(x[order[:-300]], digits[order[:-300]]), Pictures(x[order[-300:]], digits[order[-300:]])


def dressed(x: Tensor, look: int) -> Tensor:
    """Plain pictures x (n, 1, 8, 8) in a look, by its number."""
    return (x, x.rot90(1, (2, 3)), (x - 1) / 2)[look]


def prompts(digits: Tensor | list[int], word: int = BLANK) -> Tensor:
    """Prompts (n, 2), `word` before the digit."""
    digits = torch.as_tensor(digits)
    return torch.stack([torch.full_like(digits, word), digits], 1)


def outlines(x: Tensor) -> Tensor:
    """1 where a pixel of x (n, 1, 8, 8) is no stroke but beside one, above or below it; 0 elsewhere."""
    stroke = (x > 0).float()
    beside = F.max_pool2d(stroke, (1, 3), 1, (0, 1)), F.max_pool2d(stroke, (3, 1), 1, (1, 0))
    return torch.maximum(*beside) - stroke


class Judge(nn.Module):
    """A convolutional classifier of digit and look; its last features say how alike pictures are."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(1024, 64), nn.ReLU(),
        )  # fmt: skip
        self.digit, self.look = nn.Linear(64, 10), nn.Linear(64, len(LOOKS))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features (n, 64), scores of the digits (n, 10) and of the looks (n, 3) of pictures x (n, 1, 8, 8)."""
        features = self.body(x)
        return features, self.digit(features), self.look(features)

    @torch.no_grad()
    def share(self, x: Tensor, digits: Tensor | list[int], look: int) -> float:
        """The share of the pictures that it takes for their digit in that look."""
        _, digit, found = self(x)
        return float(((digit.argmax(1) == torch.as_tensor(digits)) & (found.argmax(1) == look)).float().mean())


def train_judge(pictures: Pictures, steps: int) -> Judge:
    """A judge that learned the digits in all looks, with a little noise; the same bits each time on one machine."""
    torch.manual_seed(0)
    judge, draw = Judge().train(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for _ in range(steps):
        rows = torch.randint(len(pictures.x), (96,), generator=draw)
        looks = torch.arange(len(LOOKS)).repeat_interleave(32)
        x = torch.cat([dressed(own, look) for look, own in enumerate(pictures.x[rows].split(32))])
        _, digit, look = judge(x + 0.1 * torch.randn(x.shape, generator=draw))
        optimizer.zero_grad()
        (F.cross_entropy(digit, pictures.digits[rows]) + F.cross_entropy(look, looks)).backward()
        optimizer.step()
        schedule.step()
    return judge.eval()
