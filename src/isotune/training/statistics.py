"""Statistics of a run's weights for merging: the Fisher information on rows, and the optimizer's second moments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from isotune.checkpoint.files import Statistic
from isotune.errors import IsotuneError, OptionError
from isotune.statistics.fisher import fisher
from isotune.statistics.likelihood import Expectation
from isotune.statistics.second_moment import second_moments
from isotune.statistics.stored import write_statistic
from isotune.statistics.whole_model import parameter_fisher
from isotune.training.model_folder import is_model_folder, open_trained
from isotune.training.opening import find_trained, rows_for
from isotune.training.progress import Screen, quiet_libraries
from isotune.training.recipe import Recipe
from isotune.training.session import TaskSpec
from isotune.training.tasks.names import TASKS

OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")
"""Those of `training.optim` that keep whole second moments."""


def collect_fisher(
    path: str | Path,
    data: str | None = None,
    *,
    model: str | None = None,
    columns: dict[str, str] | None = None,
    examples: int = 256,
    expectation: Expectation | None = None,
    kind: Statistic = "fisher",
    batch_size: int = 8,
    seed: int = 0,
    force: bool = False,
    progress: bool = True,
) -> Path:
    """Measure the diagonal Fisher information of what a run trained; it is kept in a file beside the weights.

    Args:
        path: A run's folder, or that of its adapter or model, wherever that is now.
        data: Rows to measure on; by default the run's training rows.
        model: The pretrained model, where it is not what the adapter was trained on by name.
        columns: Column names (`text`, `label`, `prompt`, `completion`) where they differ from the run's.
        examples: How many examples to take, drawn by the seed; all where there are fewer.
        expectation: Over the labels, as for `isotune.statistics.fisher.fisher`; by default "exact" for a
            classification and "sample" for causal-lm, and "empirical" for the kind "second_moment".
        kind: What to write it as: with "second_moment", it stands in for Adam's second moments where a run has none.
            It is larger than those by about the number of examples in a batch; see `normalise` of the rule `ota`.
        batch_size: Examples at a time; of a model that was trained in full, always one.
        seed: Of the examples, and of labels that are drawn.
        force: Use the adapter on a base model that does not look like its own.
        progress: Whether to show anything on standard error.

    Returns:
        The file: fisher.safetensors, or second_moment.safetensors.

    Raises:
        IsotuneError: The adapter, the model or the data cannot be used.
    """
    if examples < 1 or batch_size < 1:
        raise OptionError(f"examples={examples} and batch_size={batch_size} must be 1 or more")
    quiet_libraries()
    screen = Screen(progress)
    adapter, recipe = find_trained(Path(path))
    spec = TaskSpec.read(adapter)
    usual = "empirical" if kind == "second_moment" else TASKS[spec.task].expectation
    expectation = expectation or usual
    rows = rows_for(data, spec, recipe, columns or {}, ("train",))
    if expectation == "empirical":
        TASKS[spec.task].check(rows, spec.labels, "the data")
    else:
        rows = [{key: value for key, value in row.items() if key != "label"} for row in rows]
    session = open_trained(adapter, model, force)
    if (device := torch.accelerator.current_accelerator(check_available=True)) is not None:
        session.model.to(device)
    known = session.examples(rows)
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed)).tolist()[:examples]
    chosen = [known[index] for index in order]
    screen.say(f"measuring the Fisher information of {adapter} on {len(chosen)} examples")
    measure, size = (parameter_fisher, 1) if is_model_folder(adapter) else (fisher, batch_size)
    batches = [session.collator(chosen[start : start + size]) for start in range(0, len(chosen), size)]
    found = measure(session.model, batches, expectation, seed=seed, progress=screen.enabled)
    return write_statistic(adapter, kind, found, examples=len(chosen), expectation=expectation, seed=seed, data=data)


def check_keeps_second_moments(recipe: Recipe) -> None:
    """Raise IsotuneError where the optimizer of the recipe would not leave whole second moments."""
    optimizer = recipe.optimizer["name"] if recipe.optimizer else recipe.training.get("optim", OPTIMIZERS[0])
    if optimizer not in OPTIMIZERS:
        raise IsotuneError(
            f"save_second_moments needs training.optim to be {' or '.join(OPTIMIZERS)}, not {optimizer!r}"
        )
    for key in ("fsdp", "deepspeed"):
        if recipe.training.get(key):
            raise IsotuneError(f"save_second_moments does not go with training.{key}, which shards the optimizer")


def write_second_moments(adapter: Path, model: Any, optimizer: Any, **made: Any) -> Path:
    """Write second_moment.safetensors beside a trained adapter: those of its weights, each of rank one."""
    return write_statistic(adapter, "second_moment", second_moments(model, optimizer), **made)
