"""Full fine-tuning, `method: full`: no adapter, but every floating-point parameter of the pretrained model trains.

It is what adapters are compared with. It has no options, and no place among the methods of `isotune methods`.
"""

from __future__ import annotations

from torch import nn

from isotune.errors import IsotuneError, OptionError
from isotune.training.recipe import Recipe
from isotune.training.tasks.names import TASKS

FULL = "full"
LEARNING_RATE = 1e-4
"""Ours: the upper end of what encoders and small language models are fine-tuned with; large ones want less."""


def is_full(recipe: Recipe) -> bool:
    """Whether the recipe trains the model itself."""
    return bool(recipe.method["name"] == FULL)


def check_full(recipe: Recipe) -> None:
    """Raise IsotuneError for what full fine-tuning cannot do, or would have to ignore."""
    options = [key for key in recipe.method if key != "name"]
    if options:
        raise OptionError(f"method full has no options: method.{options[0]} belongs to an adapter; leave it out")
    for key in ("targets", "exclude", "overrides"):
        # Recipes of 0.1.0 say targets: attention where nothing was said.
        unsaid = (Recipe.model_fields[key].default, *(["attention"] if key == "targets" else []))
        if getattr(recipe, key) not in unsaid:
            raise OptionError(f"{key}: method full trains every layer; leave it out, or choose an adapter's method")
    if TASKS[recipe.task].has_reference:
        raise OptionError(
            f"task {recipe.task} has the model without its adapter for a reference, and method full has no adapter; "
            "choose one"
        )
    if recipe.quantization is not None:
        raise OptionError(
            "quantization is for a frozen base, and method full trains all of it; leave it out, or choose an adapter"
        )
    if recipe.dtype != "float32":
        raise IsotuneError(
            f"dtype: {recipe.dtype} is for a frozen base: most updates of full fine-tuning would be rounded away; "
            "leave it at float32, and for speed set training.bf16: true"
        )
    for key in ("fsdp", "deepspeed"):
        if recipe.training.get(key):
            raise IsotuneError(f"training.{key} does not go with method full, whose checkpoints are whole models")


def unfreeze(model: nn.Module) -> None:
    """Let every floating-point parameter train, in place."""
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
