"""What a pipeline of diffusers draws with an exported LoRA, for `benchmarks.serving`: a U-Net drawn at random."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TARGETS = r".*attn[12]\.to_(q|k|v|out\.0)"
RANK = 4
STEPS = 4


def measured(folder: Path, dtypes: Sequence[str]) -> dict[str, Any]:
    """By how much, at most, the latents of `pipe.load_lora_weights` differ from those of isotune's adapted U-Net.

    `largest` is the largest of the latents, `apart` by how much the bare U-Net's differ.
    """
    import isotune
    from isotune.checkpoint.export_diffusers import export_diffusers

    torch.manual_seed(0)
    base, adapter = folder / "unet", folder / "unet-adapter"
    small_unet().save_pretrained(base)
    ours = pipeline(base)
    bare = latents(ours)
    isotune.adapt(ours.unet, isotune.HRA(rank=RANK), TARGETS)
    with torch.no_grad():
        for parameter in ours.unet.parameters():
            if parameter.requires_grad:
                parameter += 0.5 * torch.randn_like(parameter)
    isotune.save(ours.unet, adapter)
    wanted = latents(ours)
    differences, residuals = {}, {}
    for dtype in dtypes:
        export = export_diffusers(adapter, folder / f"unet-{dtype}", dtype=dtype, base=base)
        theirs = pipeline(base)
        theirs.load_lora_weights(export.path)
        differences[dtype], residuals[dtype] = apart(latents(theirs), wanted), export.residual
    return {
        "rank": RANK, "steps": STEPS, "numbers": sum(p.numel() for p in pipeline(base).unet.parameters()),
        "largest": float(wanted.abs().max()), "apart": apart(bare, wanted),
        "differences": differences, "residuals": residuals,
    }  # fmt: skip


def small_unet() -> Any:
    """A U-Net of Stable Diffusion's form, its blocks with cross attention and those without, drawn at random."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8, layers_per_block=2, block_out_channels=(32, 64), norm_num_groups=8, cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=8,
    )  # fmt: skip


def pipeline(base: Path) -> Any:
    """Stable Diffusion's pipeline around the U-Net alone: it gets embedded prompts and gives latents."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    pipe = StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=UNet2DConditionModel.from_pretrained(base),
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: Any) -> Tensor:
    """What the pipeline makes of two drawn prompts of five words, each with noise of its own."""
    draw = torch.Generator().manual_seed(1)
    prompts, noise = torch.randn(2, 5, 32, generator=draw), torch.randn(2, 4, 8, 8, generator=draw)
    drawn: Tensor = pipe(
        prompt_embeds=prompts, latents=noise, num_inference_steps=STEPS, guidance_scale=1.0, output_type="latent"
    ).images
    return drawn


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference."""
    return float((one - other).abs().max())
