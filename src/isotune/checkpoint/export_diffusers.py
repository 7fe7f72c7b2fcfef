"""An exact LoRA as diffusers' pipelines load it: `pipe.load_lora_weights(folder)`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Literal, get_args

from safetensors.torch import save_file

from isotune.checkpoint.export import Export, export_lora
from isotune.checkpoint.files import CARD, check_writable, read_adapter, replaced_folder
from isotune.checkpoint.read_diffusers import FILE
from isotune.checkpoint.stored import PREFIX
from isotune.errors import NoLowRankFormError, OptionError

Part = Literal["unet", "transformer", "text_encoder", "text_encoder_2"]
"""The parts of a pipeline that a LoRA may be for, as names in the file begin."""
_OF_A_UNET = ("down_blocks.", "up_blocks.", "mid_block.")


def export_diffusers(
    adapter: str | Path,
    path: str | Path,
    part: Part | None = None,
    dtype: str = "float32",
    base: str | Path | None = None,
) -> Export:
    """Write the adapter saved in a folder as one LoRA under the names that diffusers' pipelines look for.

    Args:
        adapter: The folder of an adapter, as for `export_lora`.
        path: The folder to write: absent, empty, or one that holds an older such file.
        part: The part of the pipeline that was adapted; by default a U-Net, where layers are called as in one, else
            a transformer.
        dtype: Storage type: float32, float16 or bfloat16.
        base: The base model's folder or hub id; by default what the adapter's config says.

    Raises:
        NoLowRankFormError: An adapter without an exact LoRA form, or with modules trained in full.
        OptionError: An unknown part or dtype.
        CheckpointError: As `export_lora`.
    """
    if part is not None and part not in get_args(Part):
        raise OptionError(f"part {part!r} is unknown; choose {', '.join(get_args(Part))}")
    check_writable(path, FILE)
    with tempfile.TemporaryDirectory(prefix="isotune-") as scratch:
        found = export_lora(adapter, Path(scratch) / "lora", dtype, base=base)
        config, tensors, _ = read_adapter(found.path)
        card = (found.path / CARD).read_text(encoding="utf-8")
    if config["modules_to_save"]:
        raise NoLowRankFormError(
            f"{adapter} holds modules trained in full ({', '.join(config['modules_to_save'])}), which no pipeline "
            "takes from a LoRA; isotune export --to merged works for it"
        )
    unet = any(layer.startswith(_OF_A_UNET) for layer in found.ranks)
    prefix = part or ("unet" if unet else "transformer")
    with replaced_folder(path, FILE) as folder:
        # One rank for all layers, and no alpha: diffusers then scales by 1.
        save_file(
            {f"{prefix}.{key.removeprefix(PREFIX)}": tensor.contiguous() for key, tensor in tensors.items()},
            folder / FILE,
            metadata={"format": "pt"},
        )
        (folder / CARD).write_text(card, encoding="utf-8")
    return Export(Path(path), found.rank, found.ranks, found.residuals, found.dtype)
