"""What a finished run leaves in metrics.json and history.json, beside what it trained."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch

from isotune.training.measure import peak_memory_bytes
from isotune.training.recipe import Recipe
from isotune.training.trainer import AdapterTrainer

PACKAGES = ("isotune", "torch", "transformers")


def run_metrics(recipe: Recipe, trainer: AdapterTrainer, default_rate: float, head: Sequence[str]) -> dict[str, Any]:
    """Training loss, settings and costs, by flat keys; `default_rate` is the method's own learning rate."""
    encoder, above = trainable(trainer.model, head)
    state, rate = trainer.state, recipe.training["learning_rate"]
    return {
        "train_loss": _mean_loss(state.log_history),
        "method": recipe.method["name"],
        "learning_rate": rate,
        "learning_rate_is_the_methods_default": rate == default_rate,
        "optimizer": recipe.optimizer["name"] if recipe.optimizer else str(trainer.args.optim.value),
        "trainable_parameters": encoder + above,
        "trainable_parameters_encoder": encoder,
        "seconds_per_step": trainer.timer.median(),
        "tokens_per_second": _tokens_per_second(trainer),
        "peak_memory_bytes": peak_memory_bytes(),
        "steps": state.global_step,
        "epochs": state.epoch,
        "seed": recipe.seed,
        "python_version": platform.python_version(),
        **{f"{name}_version": version(name) for name in PACKAGES},
    }


def history_of(trainer: AdapterTrainer) -> list[dict[str, float]]:
    """The training losses and validations by step, those from before a resumption included."""
    return [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]


def trainable(model: torch.nn.Module, head: Sequence[str]) -> tuple[int, int]:
    """Trainable parameters beside the head, and in it, the modules at these paths."""
    counts, inside = [0, 0], tuple(f"{path}." for path in head)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts[name.startswith(inside)] += parameter.numel()
    return counts[0], counts[1]


def _tokens_per_second(trainer: AdapterTrainer) -> float | None:
    """Over all processes, which take their steps together."""
    own = trainer.timer.tokens_per_second()
    if own is None or trainer.args.world_size == 1:
        return own
    return float(trainer.accelerator.reduce(torch.tensor(own, device=trainer.args.device), "sum"))


def _mean_loss(history: list[dict[str, float]]) -> float | None:
    """Mean training loss over all steps, resumed or not: each logged loss is the mean since the last."""
    total, before = 0.0, 0
    for entry in history:
        if "loss" in entry:
            total += entry["loss"] * (entry["step"] - before)
            before = int(entry["step"])
    return total / before if before else None
