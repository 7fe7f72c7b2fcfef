"""A training run from its recipe to its metrics, resumable at any moment."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import isotune
from isotune.adapters.registry import method_class
from isotune.checkpoint.files import write_atomically
from isotune.checkpoint.load import load_weights
from isotune.checkpoint.save import save
from isotune.errors import IsotuneError
from isotune.merging.second_moment import check_informative
from isotune.model.calibrate import wants_calibration
from isotune.training.arguments import resolve_training, training_arguments
from isotune.training.data import Splits, load_splits
from isotune.training.folder import RunFolder, checkpoint_step
from isotune.training.measure import StepTimer, peak_memory_bytes, reset_peak_memory
from isotune.training.probe import Probe, extract_features, fit_probe
from isotune.training.progress import ProgressLine, Screen, is_first_process, quiet_libraries
from isotune.training.recipe import Recipe
from isotune.training.session import TASK_FILE, Session, TaskSpec, task_metrics
from isotune.training.statistics import check_keeps_second_moments, write_second_moments
from isotune.training.tasks import Example
from isotune.training.trainer import AdapterTrainer, StopOnInterrupt, resume_command

CALIBRATION_ROWS = 512
"""Training rows that a method which starts from data gets to see; its authors take 256 of 2048 tokens."""


@dataclass(frozen=True)
class Result:
    """A finished run: its metrics (flat keys, as in metrics.json), its folder, its adapter and the trained model."""

    metrics: dict[str, Any]
    output: Path
    adapter: Path
    model: Any = None
    """None where the run had been finished before."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during training, after a checkpoint was saved; `command` continues the run."""

    def __init__(self, step: int, output: Path) -> None:
        self.step = step
        self.command = resume_command(output)
        super().__init__(f"stopped after step {step}; continue with: {self.command}")


@dataclass
class _Run:
    recipe: Recipe
    folder: RunFolder
    screen: Screen
    session: Session
    examples: dict[str, list[Example]]
    timer: StepTimer = field(default_factory=StepTimer)
    stop: StopOnInterrupt = field(default_factory=StopOnInterrupt)


def train(
    recipe: Recipe,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    probe: Probe | None = None,
) -> Result:
    """Train an adapter as the recipe says, evaluate it, and leave everything in the recipe's output folder.

    Args:
        recipe: From `build_recipe`, or built in Python.
        resume: Continue the run in the output folder, to the very bits of an uninterrupted one (on the CPU).
            Of a finished run, return the results.
        overwrite: Replace a run that is in the output folder.
        progress: Whether to show anything on standard error.
        probe: For `head: probe`, one fitted before on the same rows; by default it is fitted here.

    Raises:
        IsotuneError: A mistake in the recipe, the data, the model or the output folder; nothing is written then.
        Interrupted: After Ctrl-C, once a checkpoint is saved.
    """
    quiet_libraries()
    reset_peak_memory()
    screen = Screen(progress)
    recipe, folder = _check(recipe, resume, overwrite, screen)
    finished = folder.metrics() if resume else None
    if finished is not None:
        screen.say(f"{folder.path} holds a finished run; these are its results")
        return Result(finished, folder.path, folder.adapter)
    run = _prepare(recipe, folder, screen)
    checkpoint = folder.last_checkpoint() if resume else None
    if is_first_process():
        if resume:
            folder.discard_incomplete()
            screen.say(f"resuming from {checkpoint.name}" if checkpoint else "no checkpoint yet: from the start")
        else:
            folder.create(recipe)
    if recipe.task == "classification" and recipe.head == "probe" and checkpoint is None:
        _start_from(run, probe or _fit_probe(run))
    trainer = _trainer(run)
    if checkpoint is None and wants_calibration(run.session.model):
        _calibrate(run)
    _fit(run, trainer, checkpoint)
    return _finish(run, trainer)


def _check(recipe: Recipe, resume: bool, overwrite: bool, screen: Screen) -> tuple[Recipe, RunFolder]:
    """The resolved recipe and its folder, before anything is read or written."""
    recipe = recipe.resolved()
    options = {key: value for key, value in recipe.method.items() if key != "name"}
    settings = isotune.method(recipe.method["name"], **options)
    if "learning_rate" not in recipe.training:
        screen.say(
            f"learning rate {settings.learning_rate:g}, {settings.name}'s default (training.learning_rate sets it)"
        )
    recipe = resolve_training(recipe, settings.learning_rate)
    if recipe.save_second_moments:
        check_keeps_second_moments(recipe)
    folder = RunFolder(recipe.output)
    if is_first_process():
        folder.check(resume, overwrite)
    if resume:
        _check_same(recipe, folder)
    training_arguments(recipe, recipe.output)
    return recipe, folder


def _check_same(recipe: Recipe, folder: RunFolder) -> None:
    before, now = (_flat(r.model_dump(mode="json")) for r in (folder.recipe(), recipe))
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key) and key != "output"]
    if changed:
        listed = "; ".join(f"{key}: {before.get(key)!r} then, {now.get(key)!r} now" for key in changed)
        raise IsotuneError(
            f"the recipe differs from the run's in {folder.path} ({listed}); resume with the run's own: "
            f"{resume_command(folder.path)}"
        )


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}{key}.") if isinstance(inner, dict) else {f"{prefix}{key}": inner}
    return flat


def _prepare(recipe: Recipe, folder: RunFolder, screen: Screen) -> _Run:
    """Data and the adapted model: all that can go wrong with the user's input goes wrong here."""
    splits = load_splits(recipe.data, recipe.task, recipe.seed)
    transformers.set_seed(recipe.seed)
    session = Session(TaskSpec.of(recipe, splits.labels))
    examples = _tokenised(session, splits)
    head = ["head"] if recipe.task == "classification" else []
    options = {key: value for key, value in recipe.method.items() if key != "name"}
    isotune.adapt(
        session.model,
        isotune.method(recipe.method["name"], **options),
        recipe.targets,
        exclude=recipe.exclude,
        overrides=recipe.overrides,
        train_also=[*head, *recipe.train_also],
        seed=recipe.seed,
    )
    if recipe.save_second_moments:
        check_informative(session.model)
    counts = ", ".join(f"{len(rows)} {name}" for name, rows in examples.items() if rows)
    screen.say(f"{recipe.method['name']} on {recipe.model}: {sum(_trainable(session.model)):,} trainable parameters")
    screen.say(f"examples: {counts}" + (f"; labels: {', '.join(splits.labels)}" if splits.labels else ""))
    return _Run(recipe, folder, screen, session, examples)


def _tokenised(session: Session, splits: Splits) -> dict[str, list[Example]]:
    rows = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    return {name: session.examples(part) for name, part in rows.items()}


def _trainable(model: torch.nn.Module) -> tuple[int, int]:
    """Trainable parameters in the backbone, and in the classification head."""
    counts = [0, 0]
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            counts[name.startswith("head.")] += parameter.numel()
    return counts[0], counts[1]


def _fit_probe(run: _Run) -> Probe:
    """A linear probe on the frozen model's features."""
    names = [name for name in ("train", "validation") if run.examples[name]]
    with isotune.disabled(run.session.model):
        features = split_features(run.session, {name: run.examples[name] for name in names}, run.screen)
    return fit_probe(*features["train"], len(run.session.spec.labels), features.get("validation"))


def split_features(
    session: Session, examples: dict[str, list[Example]], screen: Screen
) -> dict[str, tuple[Tensor, Tensor]]:
    """The features (n, hidden) and labels (n,) of each split, with a progress bar."""
    with screen.counting("features", sum(map(len, examples.values()))) as advance:
        return {
            name: extract_features(session.model, part, session.collator, advance=advance)
            for name, part in examples.items()
        }


def _start_from(run: _Run, probe: Probe) -> None:
    """Let the head start from a probe."""
    with torch.no_grad():
        run.session.model.head.weight.copy_(probe.weight)
        run.session.model.head.bias.copy_(probe.bias)
    shown = f": validation accuracy {probe.validation['accuracy']:.4f}" if probe.validation else ""
    run.screen.say(f"the head starts from a linear probe{shown}")


def _calibrate(run: _Run) -> None:
    """Let a method that starts from data see training rows, drawn by the recipe's seed."""
    rows, size = run.examples["train"], run.recipe.training["per_device_train_batch_size"]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(run.recipe.seed)).tolist()
    chosen = [rows[index] for index in order[:CALIBRATION_ROWS]]
    batches = [run.session.collator(chosen[start : start + size]) for start in range(0, len(chosen), size)]
    isotune.calibrate(run.session.model, batches, least_rows=1, progress=run.screen.enabled)
    run.screen.say(f"{run.recipe.method['name']} starts from {len(chosen)} training rows")


def _trainer(run: _Run) -> AdapterTrainer:
    callbacks: list[transformers.TrainerCallback] = [run.timer, ProgressLine(run.screen)]
    arguments = training_arguments(run.recipe, run.recipe.output)
    if arguments.world_size == 1:  # launchers take Ctrl-C themselves
        callbacks.append(run.stop)
    return run.session.trainer(arguments, run.examples["train"], run.examples["validation"], callbacks)


def _fit(run: _Run, trainer: AdapterTrainer, checkpoint: Path | None) -> None:
    if checkpoint is not None:
        step, last = checkpoint_step(checkpoint)
        if step >= last:  # killed between the last checkpoint and the metrics
            load_weights(run.session.model, checkpoint / "adapter")
            trainer.state = transformers.TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            if run.recipe.save_second_moments:
                trainer.create_optimizer().load_state_dict(torch.load(checkpoint / "optimizer.pt", weights_only=True))
            return
    with run.stop.installed():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if run.stop.requested:
        raise Interrupted(trainer.state.global_step, run.folder.path)


def _finish(run: _Run, trainer: AdapterTrainer) -> Result:
    metrics: dict[str, Any] = {}
    if is_first_process():
        save(run.session.model, run.folder.adapter, base_model=run.recipe.model)
        write_atomically(run.folder.adapter / TASK_FILE, run.session.spec.to_json())
        if run.recipe.save_second_moments:
            write_second_moments(
                run.folder.adapter, run.session.model, trainer.optimizer, steps=trainer.state.global_step
            )
    for name in ("validation", "test"):
        if run.examples[name]:
            metrics |= _measured(run, trainer, name)
    metrics |= _costs(run, trainer)
    if is_first_process():
        write_atomically(run.folder.metrics_file, json.dumps(metrics, indent=2) + "\n")
    return Result(metrics, run.folder.path, run.folder.adapter, run.session.model)


def _measured(run: _Run, trainer: AdapterTrainer, name: str) -> dict[str, float]:
    """Metrics on a split; those of the validation rows stand where the last step was validated already."""
    last = next((entry for entry in reversed(trainer.state.log_history) if "eval_loss" in entry), None)
    current = last is not None and last["step"] == trainer.state.global_step
    if name == "validation" and last is not None and current and not trainer.args.load_best_model_at_end:
        return task_metrics({key.replace("eval_", f"{name}_", 1): value for key, value in last.items()}, name)
    with run.screen.console.status(f"evaluating on the {name} rows"):
        return task_metrics(trainer.evaluate(run.examples[name], metric_key_prefix=name), name)


def _costs(run: _Run, trainer: AdapterTrainer) -> dict[str, Any]:
    encoder, head = _trainable(run.session.model)
    state = trainer.state
    rate, own = run.recipe.training["learning_rate"], method_class(run.recipe.method["name"]).learning_rate
    packages = ("isotune", "torch", "transformers")
    return {
        "train_loss": _mean_loss(state.log_history),
        "method": run.recipe.method["name"],
        "learning_rate": rate,
        "learning_rate_is_the_methods_default": rate == own,
        "trainable_parameters": encoder + head,
        "trainable_parameters_encoder": encoder,
        "seconds_per_step": run.timer.median(),
        "peak_memory_bytes": peak_memory_bytes(),
        "steps": state.global_step,
        "epochs": state.epoch,
        "seed": run.recipe.seed,
        "python_version": platform.python_version(),
        **{f"{name}_version": version(name) for name in packages},
    }


def _mean_loss(history: list[dict[str, float]]) -> float | None:
    """Mean training loss over all steps, resumed or not: each logged loss is the mean since the last."""
    total, before = 0.0, 0
    for entry in history:
        if "loss" in entry:
            total += entry["loss"] * (entry["step"] - before)
            before = int(entry["step"])
    return total / before if before else None
