"""A U-Net of Stable Diffusion's design, small enough for pictures of 8 x 8: its words come in by cross attention.

Letters of shapes: n (pictures), c (channels), h and w (pixels), m (positions, h w), k (words of a prompt).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WORDS, WIDTH, INNER, HEADS = 13, 32, 64, 2
ATTENTION = r".*\.attn[12]\.to_(q|k|v|out)"
"""The projections of self and cross attention, on which the paper's adapters go."""
ATTENTION_AND_MLP = rf"{ATTENTION}|.*\.ff\.[02]"


class Attention(nn.Module):
    """Attention from x to itself or to the words."""

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k, self.to_v = (nn.Linear(context, width, bias=False) for _ in range(2))
        self.to_out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Of x (n, m, c) and what it attends to (n, k, context), the new x (n, m, c)."""
        projected = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in projected)
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        return self.to_out((weights @ v).transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """Attention among the pixels, then to the words, then an MLP on each pixel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attn1, self.attn2 = Attention(width, width), Attention(width, WIDTH)
        self.ff = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        """Of x (n, c, h, w) and words (n, k, WIDTH), the new x."""
        shape, x = x.shape, x.flatten(2).mT
        own = self.norm1(x)
        x = x + self.attn1(own, own)
        x = x + self.attn2(self.norm2(x), words)
        return (x + self.ff(self.norm3(x))).mT.reshape(shape)


class Residual(nn.Module):
    """Two convolutions beside a shortcut, told of the time in between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, width), nn.Conv2d(width, width, 3, padding=1)
        self.time = nn.Linear(INNER, width)
        self.norm2, self.conv2 = nn.GroupNorm(8, width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Of x (n, c, h, w) and time (n, INNER), the new x."""
        y = self.conv1(F.silu(self.norm1(x))) + self.time(time)[..., None, None]
        return x + self.conv2(F.silu(self.norm2(y)))


class Level(nn.Module):
    """What happens at one resolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.residual, self.transformer = Residual(width), Transformer(width)

    def forward(self, x: Tensor, time: Tensor, words: Tensor) -> Tensor:
        """Of x (n, c, h, w), time (n, INNER) and words (n, k, WIDTH), the new x."""
        return self.transformer(self.residual(x, time), words)


class UNet(nn.Module):
    """Says which noise is in a picture, from the picture, the time and a prompt of words by their numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.time = nn.Sequential(nn.Linear(WIDTH, INNER), nn.SiLU(), nn.Linear(INNER, INNER), nn.SiLU())
        self.conv_in: nn.Module = nn.Conv2d(1, WIDTH, 3, padding=1)
        self.down1, self.down2 = Level(WIDTH), Level(INNER)
        self.shrink, self.grow = nn.Conv2d(WIDTH, INNER, 3, 2, padding=1), nn.Conv2d(INNER, WIDTH, 3, padding=1)
        self.up2, self.up1 = Level(INNER), Level(WIDTH)
        self.norm_out, self.conv_out = nn.GroupNorm(8, WIDTH), nn.Conv2d(WIDTH, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        """The noise (n, 1, h, w) in x (n, 1 or 2, h, w), at the times t (n) from 0 to 1, for a prompt (n, k)."""
        time, words = self.time(waves(t)), self.words(prompt)
        first = self.down1(self.conv_in(x), time, words)
        second = self.down2(self.shrink(first), time, words)
        y = self.grow(self.up2(second, time, words))
        y = self.up1(first + F.interpolate(y, scale_factor=2.0), time, words)
        return self.conv_out(F.silu(self.norm_out(y)))


def waves(t: Tensor) -> Tensor:
    """Sines and cosines (n, WIDTH) of the times t (n), from half a turn to a thousand of them."""
    turns = torch.logspace(0, 3, WIDTH // 2, dtype=t.dtype) * math.pi
    return torch.cat([torch.sin(t[:, None] * turns), torch.cos(t[:, None] * turns)], 1)


class OutlineInput(nn.Module):
    """The U-Net's first convolution, and beside it one that reads an outline, from zero, and trains in full."""

    def __init__(self, conv_in: nn.Module) -> None:
        super().__init__()
        self.picture, self.outline = conv_in, nn.Conv2d(1, WIDTH, 3, padding=1, bias=False)
        nn.init.zeros_(self.outline.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Of a noisy picture and an outline (n, 2, h, w), the features (n, WIDTH, h, w)."""
        return self.picture(x[:, :1]) + self.outline(x[:, 1:])
