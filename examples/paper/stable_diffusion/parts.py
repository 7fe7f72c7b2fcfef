"""Stable Diffusion 1.5 in parts, its U-Net to be adapted: opening, one loss, one training loop, pictures."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image, ImageOps
from rich.progress import track
from torch import Tensor, nn

import isotune
from isotune import Settings

ATTENTION = r".*attn[12]\.to_(q|k|v|out\.0)"
GEGLU = r".*\.ff\.net\.0\.proj"


def arguments_of(about: str | None, size: str) -> argparse.ArgumentParser:
    """A parser with what both scripts are told; `size` says what that of a method is."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the adapter and the pictures")
    parser.add_argument("--model", default="stable-diffusion-v1-5/stable-diffusion-v1-5", help="a name or a folder")
    parser.add_argument("--method", default="hra", help="any method of `isotune methods`")
    parser.add_argument("--size", type=int, default=8, help=size)
    parser.add_argument("--sampling-steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


class Parts:
    """A pipeline on its device, all of it frozen and in fp32; the U-Net computes in bf16 on a GPU while it trains."""

    def __init__(self, model: str, device: str) -> None:
        self.pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None, requires_safety_checker=False)
        self.pipe.set_progress_bar_config(disable=True)
        self.unet: Any = self.pipe.unet.to(device).requires_grad_(False)
        self.device = torch.device(device)
        for part in (self.pipe.vae, self.pipe.text_encoder):
            part.to(device).requires_grad_(False)
        self.noise = DDPMScheduler.from_config(self.pipe.scheduler.config)
        self.size = self.unet.config.sample_size * self.pipe.vae_scale_factor

    @torch.no_grad()
    def latents(self, images: Tensor) -> Tensor:
        """Latents (n, 4, h / 8, w / 8) of images (n, 3, h, w) from -1 to 1, drawn from torch's global generator."""
        drawn = self.pipe.vae.encode(images.to(self.device)).latent_dist.sample()
        return drawn * self.pipe.vae.config.scaling_factor

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """The prompts as the U-Net reads them (n, tokens, width)."""
        tokens = self.pipe.tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt")
        return self.pipe.text_encoder(tokens.input_ids.to(self.device))[0]

    def loss(self, latents: Tensor, texts: Tensor, extra: Tensor | None = None) -> Tensor:
        """The mean square error of the noise that the U-Net finds; `extra` are channels beside the latents."""
        noise = torch.randn_like(latents)
        steps = torch.randint(self.noise.config.num_train_timesteps, (len(latents),), device=self.device)
        noisy = self.noise.add_noise(latents, noise, steps)
        if extra is not None:
            noisy = torch.cat([noisy, extra], 1)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            found = self.unet(noisy, steps, encoder_hidden_states=texts).sample
        return F.mse_loss(found.float(), noise)


def settings_for(method: str, size: int, **options: Any) -> Settings:
    """The method with its size, be it a rank or that of a block; methods that have none stay as they are."""
    name = isotune.method(method).size_option
    return isotune.method(method, **({name: size} if name else {}), **options)


def open_images(files: Sequence[Path], size: int) -> Tensor:
    """Images (n, 3, size, size) from -1 to 1, cut to squares at their middle."""
    images = [ImageOps.fit(Image.open(file).convert("RGB"), (size, size)) for file in files]
    return torch.stack(
        [torch.from_numpy(np.asarray(image, np.float32) / 127.5 - 1).permute(2, 0, 1) for image in images]
    )


def image_files(folder: Path) -> list[Path]:
    """The images of a folder in the order of their names. Raises SystemExit where there is none."""
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if not found:
        raise SystemExit(f"{folder} has no .png, .jpg or .webp images; say where they are")
    return found


def shuffled(n: int, batch: int, seed: int) -> Iterator[list[int]]:
    """Rows of batches without end, every epoch in an order of its own."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(n, generator=draw)
        yield from (rows.tolist() for rows in order.split(batch))


def train(unet: nn.Module, loss: Callable[[], Tensor], steps: int, rate: float) -> None:
    """AdamW with decay 0.01 on what trains, at a constant rate, as the paper's code has it."""
    unet.train()
    optimizer = torch.optim.AdamW(isotune.parameter_groups(unet, lr=rate, weight_decay=1e-2))
    for step in track(range(steps), "training"):
        optimizer.zero_grad()
        value = loss() + isotune.penalty(unet)
        value.backward()
        optimizer.step()
        isotune.after_step(unet, (step + 1) / steps, optimizer)
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: loss {float(value.detach()):.4f}", flush=True)
    unet.eval()
