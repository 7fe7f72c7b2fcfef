"""`isotune export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isotune.cli.output import print_json, print_table
from isotune.errors import OptionError

if TYPE_CHECKING:
    from isotune.checkpoint.export import Export

Flag = typer.Option
AsJson = Annotated[bool, Flag("--json", help="Only the result, as JSON, on standard output.")]

_EXPORT_HELP = """Turn an adapter into something that others load.

  lora       an exact LoRA, loaded as it is by PEFT, vLLM, TGI, llama.cpp's converter

  diffusers  the same for a pipeline: pipe.load_lora_weights(FOLDER)

  merged     the base model with the adapter folded into its weights

  peft       the same adapter in PEFT's layout, refused where PEFT has no such method

Examples:

  isotune export runs/one --to lora --output one-lora --dtype bfloat16 --rank-multiple 8

  isotune export ./adapter --to merged --base ./llama --output llama-merged
"""


def export_command(
    adapter: Annotated[Path, typer.Argument(help="An adapter's folder, isotune's or PEFT's, or a run's.")],
    to: Annotated[str, Flag(help="lora, diffusers, merged or peft.")],
    output: Annotated[Path, Flag(help="Folder to write: new, or an older export.")],
    base: Annotated[str | None, Flag(help="The base model, if the adapter's config does not find it.")] = None,
    dtype: Annotated[str, Flag(help="lora, diffusers: float32, float16 or bfloat16.")] = "float32",
    part: Annotated[
        str | None, Flag(help="diffusers: unet, transformer, text_encoder; by default told by the layers' names.")
    ] = None,
    rank_multiple: Annotated[int, Flag(help="lora: round the rank up to a multiple of this.")] = 1,
    task: Annotated[str | None, Flag(help="lora: the task that is meant, of a method that mixes by task.")] = None,
    force: Annotated[bool, Flag("--force", help="Accept a base model unlike the adapter's own.")] = False,
    as_json: AsJson = False,
) -> None:
    from isotune.training.export import base_of, export_merged
    from isotune.training.folder import adapter_folder

    source = adapter_folder(adapter)
    if to in ("lora", "diffusers"):
        found: Export
        if to == "lora":
            from isotune.checkpoint.export import export_lora

            found = export_lora(source, output, dtype, rank_multiple, base_of(source, base), task)
        else:
            from isotune.checkpoint.export_diffusers import export_diffusers

            kind: Any = part
            found = export_diffusers(source, output, kind, dtype, base)
        if as_json:
            print_json({**vars(found), "residual": found.residual})
            return
        print_table(
            f"{found.path}: LoRA of rank {found.rank} at {len(found.ranks)} layers, stored as {found.dtype}",
            ["layer", "rank", "residual"],
            [[p, str(found.ranks[p]), f"{residual:.1e}"] for p, residual in found.residuals.items()],
            f"residual: |W + B A - W'| / |W| as stored; the largest is {found.residual:.1e}",
        )
        return
    if to == "merged":
        written = export_merged(source, output, base=base, force=force)
    elif to == "peft":
        from isotune.checkpoint.export_peft import export_peft

        written = export_peft(source, output)
    else:
        raise OptionError(f"--to {to!r} is unknown; choose lora, diffusers, merged or peft")
    print_json({"path": str(written)}) if as_json else print(f"{written}: written, {to}")


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("export", help=_EXPORT_HELP)(export_command)
