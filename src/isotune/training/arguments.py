"""The `training` section of a recipe: checked against `transformers.TrainingArguments`, with our defaults."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from transformers import TrainingArguments

from isotune.errors import IsotuneError, nearest
from isotune.training.recipe import Recipe
from isotune.training.tasks.contract import higher_is_better
from isotune.training.tasks.names import metric_of

AUTO = "auto"
"""As `learning_rate`: to be found on the training rows."""

DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.06,
    "weight_decay": 0.0,
    "logging_steps": 10,
    "save_strategy": "steps",
    "save_steps": 100,
    "save_total_limit": 2,
    "report_to": "none",
}
"""What a recipe gets where it is silent; a fraction as `warmup_steps` is a share of all steps."""

_OURS = {
    "output_dir": "output",
    "seed": "seed",
    "resume_from_checkpoint": "the flag --resume",
    "push_to_hub": "nothing; runs stay on this machine",
    "disable_tqdm": "nothing; progress goes to the terminal by itself",
    "remove_unused_columns": "nothing; only the columns named under data are read",
}


def resolve_training(recipe: Recipe, hint: float) -> Recipe:
    """The recipe with every training default filled in and every field checked.

    Args:
        recipe: The recipe as written.
        hint: The method's own learning rate, used where the recipe gives none.

    Raises:
        IsotuneError: An unknown field (with the nearest known one), a value of the wrong kind, or a metric that the
            task does not measure.
    """
    types = typing.get_type_hints(TrainingArguments)
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    for name, value in recipe.training.items():
        if name in _OURS:
            raise IsotuneError(f"training.{name} is decided elsewhere: use {_OURS[name]}")
        if name not in fields:
            raise IsotuneError(f"unknown key 'training.{name}'.{nearest(name, fields - _OURS.keys())}")
        if (name, value) != ("learning_rate", AUTO):
            _check(name, value, types[name])
    evaluates = {"eval_strategy": "epoch" if recipe.data.validation is not None else "no"}
    training = {**DEFAULTS, **evaluates, **_best_by(recipe), "learning_rate": hint, **recipe.training}
    if recipe.data.validation is None and training["eval_strategy"] != "no":
        raise IsotuneError("training.eval_strategy needs validation rows, and data.validation is null")
    return recipe.model_copy(update={"training": training})


def _best_by(recipe: Recipe) -> dict[str, Any]:
    """By what the best checkpoint is chosen, where one is asked for and the recipe names a metric; else the loss."""
    metric = metric_of(recipe.task, recipe.metric)
    if recipe.metric is None or not recipe.training.get("load_best_model_at_end"):
        return {}
    return {"metric_for_best_model": metric, "greater_is_better": higher_is_better(metric)}


def training_arguments(recipe: Recipe, output: str) -> TrainingArguments:
    """Build the arguments of a resolved recipe; at least two checkpoints are always kept.

    A learning rate that is yet to be found is left at transformers' own.
    """
    values = {key: value for key, value in recipe.training.items() if (key, value) != ("learning_rate", AUTO)}
    if values.get("save_total_limit") is not None:
        values["save_total_limit"] = max(2, values["save_total_limit"])
    gpu = torch.cuda.is_available()
    values = {
        **machine_arguments(),
        **precision_on(gpu, gpu and torch.cuda.is_bf16_supported(including_emulation=False), values),
        **values,
    }
    values.setdefault("ddp_find_unused_parameters", False)
    values.setdefault("logging_nan_inf_filter", False)
    try:
        return TrainingArguments(
            output_dir=output, seed=recipe.seed, disable_tqdm=True, remove_unused_columns=False, **values
        )
    except (ValueError, TypeError, KeyError, ImportError) as error:
        raise IsotuneError(f"training: {error}") from None


def machine_arguments() -> dict[str, Any]:
    """Fields that depend on the machine: without `use_cpu`, processes on a CPU would not find each other."""
    return {"use_cpu": not torch.accelerator.is_available(), "dataloader_pin_memory": torch.cuda.is_available()}


def precision_on(gpu: bool, bf16: bool, asked: Mapping[str, Any]) -> dict[str, Any]:
    """The precision of training where a recipe asks for none: autocast to bf16 on a GPU that computes in it.

    Adapters, their optimizer and the r x r algebra stay in fp32.
    """
    return {"bf16": True} if gpu and bf16 and not asked.keys() & {"bf16", "fp16"} else {}


def _check(name: str, value: Any, expected: Any) -> None:
    try:
        adapter = TypeAdapter(expected, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:
        return
    try:
        adapter.validate_python(value)
    except ValidationError as error:
        raise IsotuneError(f"key 'training.{name}': {error.errors()[0]['msg']} (got {value!r})") from None
