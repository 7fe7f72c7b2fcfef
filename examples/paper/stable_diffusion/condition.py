"""Controllable generation with Stable Diffusion 1.5, as in the HRA paper: pictures that follow a given picture.

    python examples/paper/stable_diffusion/condition.py path/to/data --output runs/canny

The folder has `metadata.jsonl`, a line {"image": ..., "condition": ..., "text": ...} for each picture, with names of
files in it; the condition is a picture such as edges, landmarks or a segmentation in colours. A small convolutional
encoder, trained in full, adds it to what the U-Net's first convolution gives, and the adapter is on the projections
of attention and of the GEGLUs: 0.9 million numbers. The paper: rank 8, batch 8, 11 epochs on COCO with Canny edges,
20 on ADE20K and CelebA-HQ; its encoder is larger. Pictures for the conditions of `--test` come last. Needs a GPU,
diffusers and Pillow, and the model on the disk or from the hub. Not run by us with the real weights.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import torch
from parts import ATTENTION, GEGLU, Parts, arguments_of, open_images, settings_for, shuffled, train
from torch import Tensor, nn

import isotune


class ConditionedInput(nn.Module):
    """The U-Net's first convolution, and an encoder of the condition whose last layer starts from zero."""

    def __init__(self, conv_in: nn.Conv2d, factor: int) -> None:
        super().__init__()
        self.latents, self.factor = conv_in, factor
        widths = [3 * factor * factor, 128, 128, conv_in.out_channels]
        layers = [nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths)]
        nn.init.zeros_(layers[-1].weight)
        nn.init.zeros_(layers[-1].bias)
        self.condition = nn.Sequential(layers[0], nn.SiLU(), layers[1], nn.SiLU(), layers[2])

    def forward(self, x: Tensor) -> Tensor:
        """Of latents and, behind them, a condition (n, 4 + 3 factor², h, w), the features (n, out, h, w)."""
        return self.latents(x[:, :4]) + self.condition(x[:, 4:])


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = arguments_of(__doc__, "rank, or size of a block")
    parser.add_argument("data", type=Path, help="folder with metadata.jsonl and the pictures")
    parser.add_argument("--test", type=Path, help="a folder alike, of which pictures are made; by default the data's")
    parser.add_argument("--rate", type=float, default=5.5e-4, help="HRA's, as far a step as the authors' 9e-4")
    parser.add_argument("--epochs", type=int, default=11)
    parser.add_argument("--steps", type=int, help="in place of epochs")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--made", type=int, default=16, help="how many pictures to make")
    return parser.parse_args()


def read(folder: Path) -> list[dict[str, str]]:
    """The lines of metadata.jsonl, with the files' whole paths."""
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{**row, **{name: str(folder / row[name]) for name in ("image", "condition")}} for row in rows]


def conditions(parts: Parts, rows: list[dict[str, str]]) -> Tensor:
    """The conditions of the rows, at the latents' resolution: a block of pixels as channels (n, 3 factor², h, w)."""
    images = open_images([Path(row["condition"]) for row in rows], parts.size)
    return nn.functional.pixel_unshuffle(images, parts.pipe.vae_scale_factor).to(parts.device)


def learn(parts: Parts, asked: argparse.Namespace, rows: list[dict[str, str]]) -> None:
    """Batches of pictures, each with its condition and its text."""
    batches = shuffled(len(rows), asked.batch, asked.seed)

    def loss() -> Tensor:
        chosen = [rows[i] for i in next(batches)]
        latents = parts.latents(open_images([Path(row["image"]) for row in chosen], parts.size))
        return parts.loss(latents, parts.texts([row["text"] for row in chosen]), conditions(parts, chosen))

    train(parts.unet, loss, asked.steps or asked.epochs * -(-len(rows) // asked.batch), asked.rate)


@torch.no_grad()
def make(parts: Parts, row: dict[str, str], seed: int, steps: int, guidance: float = 7.5) -> Tensor:
    """A picture (1, 3, h, w) from 0 to 1 for the text and the condition of a row, with guidance by an empty text."""
    scheduler, given = parts.pipe.scheduler, conditions(parts, [row])
    scheduler.set_timesteps(steps, device=parts.device)
    texts = parts.texts(["", row["text"]])
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn((1, 4, *given.shape[2:]), generator=draw).to(parts.device) * scheduler.init_noise_sigma
    for step in scheduler.timesteps:
        both = torch.cat([scheduler.scale_model_input(x, step), given], 1).expand(2, -1, -1, -1)
        without, towards = parts.unet(both, step, encoder_hidden_states=texts).sample.chunk(2)
        x = scheduler.step(without + guidance * (towards - without), step, x).prev_sample
    image = parts.pipe.vae.decode(x / parts.pipe.vae.config.scaling_factor).sample
    return (image / 2 + 0.5).clamp(0, 1).cpu()


def main() -> None:
    """Training, the adapter with its encoder, pictures for the conditions of the test."""
    asked = arguments()
    torch.manual_seed(asked.seed)
    parts = Parts(asked.model, asked.device)
    conv_in = ConditionedInput(parts.unet.conv_in, parts.pipe.vae_scale_factor).to(asked.device)
    parts.unet.conv_in = conv_in
    settings = settings_for(asked.method, asked.size)
    isotune.adapt(parts.unet, settings, f"{ATTENTION}|{GEGLU}", train_also=["conv_in.condition"], seed=asked.seed)
    print(
        f"{sum(row.trainable for row in isotune.describe(parts.unet)):,} numbers train, at a rate of {asked.rate:g}"
    )
    learn(parts, asked, read(asked.data))
    isotune.save(parts.unet, asked.output / "adapter")
    for place, row in enumerate(read(asked.test or asked.data)[: asked.made]):
        image = make(parts, row, asked.seed + place, asked.sampling_steps)
        parts.pipe.image_processor.postprocess(image * 2 - 1)[0].save(asked.output / f"{place:03}.png")


if __name__ == "__main__":
    main()
