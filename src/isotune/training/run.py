"""A training run from its recipe to its metrics, resumable at any moment."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

import isotune
from isotune.adapters.registry import method_class
from isotune.adapters.settings import Settings
from isotune.checkpoint.files import replaced_folder, write_atomically
from isotune.checkpoint.save import save
from isotune.folders import MODEL_CONFIG, TASK
from isotune.model.calibrate import wants_calibration
from isotune.statistics.second_moment import check_informative
from isotune.training.arguments import AUTO, resolve_training, training_arguments
from isotune.training.baselines import constant_scores, keep, kept, measured_baselines
from isotune.training.classifiers import OWN, pooling_of
from isotune.training.data import Splits, load_splits
from isotune.training.folder import RunFolder, adapter_folder, checkpoint_step, resume_command
from isotune.training.full import LEARNING_RATE, check_full, is_full, unfreeze
from isotune.training.measure import reset_peak_memory
from isotune.training.model_folder import write_model
from isotune.training.optimizers import check_optimizer, rate_factor
from isotune.training.probe import Probe
from isotune.training.progress import ProgressLine, Screen, is_first_process, lone_process, quiet_libraries
from isotune.training.range_test import found_rate
from isotune.training.recipe import Recipe
from isotune.training.results import history_of, run_metrics, trainable
from isotune.training.session import Session, TaskSpec
from isotune.training.start import calibrate_on, probe_of, start_from, starts_from_probe
from isotune.training.statistics import check_keeps_second_moments, write_second_moments
from isotune.training.tasks.collator import Example
from isotune.training.trainer import AdapterTrainer, Along, StopOnInterrupt
from isotune.training.weights import load_weights


@dataclass(frozen=True)
class Result:
    """A finished run: its metrics (flat keys, as in metrics.json), its folder, and the trained model."""

    metrics: dict[str, Any]
    output: Path
    trained: Path
    """The adapter's folder or, with `method: full`, the model's."""
    model: Any = None
    """None where the run had been finished before."""

    @property
    def adapter(self) -> Path:
        """The adapter's folder. Raises IsotuneError where the run trained the whole model."""
        return adapter_folder(self.output)


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
    constant: dict[str, float]
    """What saying always the same scores."""
    stop: StopOnInterrupt = field(default_factory=StopOnInterrupt)


def train(
    recipe: Recipe,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    probe: Probe | None = None,
    baselines: bool = True,
    along: Along | None = None,
) -> Result:
    """Train an adapter, or the whole model, as the recipe says, evaluate it, and leave all in its output folder.

    Args:
        recipe: From `build_recipe`, or built in Python.
        resume: Continue the run in the output folder, to the very bits of an uninterrupted one (on the CPU).
            Of a finished run, return the results.
        overwrite: Replace a run that is in the output folder.
        progress: Whether to show anything on standard error.
        probe: For `head: probe`, one fitted before on the same rows; by default it is fitted here.
        baselines: Whether to measure what the scores are against: a probe on the test rows, or a language model
            before it is trained.
        along: Measures the model beside each validation, for the history.

    Raises:
        IsotuneError: A mistake in the recipe, the data, the model or the output folder; nothing is written then.
        Interrupted: After Ctrl-C, once a checkpoint is saved.
    """
    quiet_libraries()
    reset_peak_memory()
    screen = Screen(progress)
    if (alone := lone_process()) is not None:
        screen.say(alone)
    recipe, folder = _check(recipe, resume, overwrite, screen)
    finished = folder.metrics() if resume else None
    if finished is not None:
        screen.say(f"{folder.path} holds a finished run; these are its results")
        return Result(finished, folder.path, _trained(folder, recipe))
    run = _prepare(recipe, folder, screen)
    checkpoint = folder.last_checkpoint() if resume else None
    if is_first_process():
        if resume:
            folder.discard_incomplete()
            screen.say(f"resuming from {checkpoint.name}" if checkpoint else "no checkpoint yet: from the start")
        else:
            folder.create(recipe)
    if starts_from_probe(recipe) and checkpoint is None:
        probe = probe or probe_of(run.session, run.examples, screen)
        start_from(run.session, probe, screen)
    trainer = _trainer(run, along)
    if checkpoint is None and baselines:
        against = run.constant | measured_baselines(run.session, trainer, run.examples, probe, screen)
        if is_first_process():
            keep(folder, against)
    if checkpoint is None and wants_calibration(run.session.model):
        calibrate_on(run.session, run.examples["train"], recipe, screen)
    if recipe.training["learning_rate"] == AUTO:
        found = found_rate(trainer, run.folder.path, _default_rate(recipe), screen)
        run.recipe = recipe.model_copy(update={"training": {**recipe.training, "learning_rate": found}})
    _fit(run, trainer, checkpoint)
    return _finish(run, trainer)


def _check(recipe: Recipe, resume: bool, overwrite: bool, screen: Screen) -> tuple[Recipe, RunFolder]:
    """The resolved recipe and its folder, before anything is read or written."""
    recipe = recipe.resolved()
    _check_method(recipe)
    name, rate = recipe.method["name"], _default_rate(recipe)
    if "learning_rate" not in recipe.training:
        how = f" with {recipe.optimizer['name']}" if recipe.optimizer else ""
        screen.say(f"learning rate {rate:g}, {name}'s default{how} (training.learning_rate sets it)")
    recipe = resolve_training(recipe, rate)
    if recipe.save_second_moments:
        check_keeps_second_moments(recipe)
    folder = RunFolder(recipe.output)
    if is_first_process():
        folder.check(resume, overwrite)
    if resume:
        folder.check_same(recipe)
    check_optimizer(recipe)
    training_arguments(recipe, recipe.output)
    return recipe, folder


def _check_method(recipe: Recipe) -> None:
    if is_full(recipe):
        check_full(recipe)
    else:
        _settings(recipe)


def _settings(recipe: Recipe) -> Settings:
    return isotune.method(**recipe.method)


def _default_rate(recipe: Recipe) -> float:
    """The method's own learning rate, for the optimizer of the recipe."""
    rate = LEARNING_RATE if is_full(recipe) else method_class(recipe.method["name"]).learning_rate
    return rate * rate_factor(recipe.optimizer)


def _prepare(recipe: Recipe, folder: RunFolder, screen: Screen) -> _Run:
    """Data and the model that is to be trained: all that can go wrong with the user's input goes wrong here."""
    splits = load_splits(recipe.data, recipe.task, recipe.seed)
    transformers.set_seed(recipe.seed)
    session = Session(TaskSpec.of(recipe, splits.labels, splits.positive))
    examples = _tokenised(session, splits)
    if is_full(recipe):
        unfreeze(session.model)
    else:
        _adapt(session, recipe)
    if recipe.save_second_moments:
        check_informative(session.model)
    if session.head and (pooling := pooling_of(session.model)) != OWN:
        screen.say(
            f"pooling {pooling}: the model's own class for classification pools otherwise, so that a class of ours "
            "is taken; transformers opens what is exported of it with trust_remote_code=True"
        )
    if not any(getattr(recipe.data, key) for key in ("text", "image", "audio", "prompt", "messages")):
        said = "; ".join(f"{key}: {', '.join(names)}" for key, names in splits.columns.items())
        screen.say(f"columns, by their usual names: {said}")
    counts = ", ".join(f"{len(rows)} {name}" for name, rows in examples.items() if rows)
    inside, head = trainable(session.model, session.head)
    above = f", and {head:,} in the head" if head else ""
    screen.say(f"{recipe.method['name']} on {recipe.model}: {inside:,} trainable parameters{above}")
    screen.say(f"examples: {counts}" + (f"; labels: {', '.join(splits.labels)}" if splits.labels else ""))
    return _Run(recipe, folder, screen, session, examples, constant_scores(session, splits))


def _adapt(session: Session, recipe: Recipe) -> None:
    isotune.adapt(
        session.model,
        _settings(recipe),
        recipe.targets,
        exclude=recipe.exclude,
        overrides=recipe.overrides,
        train_also=[*session.head, *recipe.train_also],
        seed=recipe.seed,
    )


def _tokenised(session: Session, splits: Splits) -> dict[str, list[Example]]:
    rows = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    return {name: session.examples(part) for name, part in rows.items()}


def _trainer(run: _Run, along: Along | None) -> AdapterTrainer:
    callbacks: list[transformers.TrainerCallback] = [ProgressLine(run.screen, run.session.spec.judged_by)]
    arguments = training_arguments(run.recipe, run.recipe.output)
    if arguments.world_size == 1:  # launchers take Ctrl-C themselves
        callbacks.append(run.stop)
    return run.session.trainer(
        arguments, run.examples["train"], run.examples["validation"], callbacks, run.recipe.optimizer, along
    )


def _fit(run: _Run, trainer: AdapterTrainer, checkpoint: Path | None) -> None:
    if checkpoint is not None:
        step, last = checkpoint_step(checkpoint)
        if step >= last:  # killed between the last checkpoint and the metrics
            load_weights(run.session.model, checkpoint)
            trainer.state = transformers.TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            if run.recipe.save_second_moments:
                trainer.create_optimizer().load_state_dict(torch.load(checkpoint / "optimizer.pt", weights_only=True))
            if trainer.misses_evaluation():
                trainer.evaluate()
            return
    with run.stop.installed():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if run.stop.requested:
        raise Interrupted(trainer.state.global_step, run.folder.path)


def _finish(run: _Run, trainer: AdapterTrainer) -> Result:
    metrics: dict[str, Any] = {}
    if is_first_process():
        _save(run)
        if run.recipe.save_second_moments:
            where = _trained(run.folder, run.recipe)
            write_second_moments(where, run.session.model, trainer.optimizer, steps=trainer.state.global_step)
    for name in ("validation", "test"):
        if run.examples[name]:
            metrics |= _measured(run, trainer, name)
            metrics |= run.session.task.intervals(metrics, len(run.examples[name]), f"{name}_")
    if run.session.by_label:  # of the split that was measured last
        metrics["test_labels" if run.examples["test"] else "validation_labels"] = run.session.by_label
    if run.examples["test"]:
        metrics["test_rows"] = len(run.examples["test"])
    metrics |= kept(run.folder)
    metrics |= run_metrics(run.recipe, trainer, _default_rate(run.recipe), run.session.head)
    if is_first_process():
        write_atomically(run.folder.history_file, json.dumps(history_of(trainer)) + "\n")
        write_atomically(run.folder.metrics_file, json.dumps(metrics, indent=2) + "\n")
    return Result(metrics, run.folder.path, _trained(run.folder, run.recipe), run.session.model)


def _trained(folder: RunFolder, recipe: Recipe) -> Path:
    return folder.model if is_full(recipe) else folder.adapter


def _save(run: _Run) -> None:
    """The trained adapter, or model, for good."""
    session = run.session
    if is_full(run.recipe):
        with replaced_folder(run.folder.model, replaces=MODEL_CONFIG) as folder:
            write_model(folder, session.model, session.tokenizer, session.spec)
        return
    save(session.model, run.folder.adapter, base_model=run.recipe.model)
    write_atomically(run.folder.adapter / TASK, session.spec.to_json())


def _measured(run: _Run, trainer: AdapterTrainer, name: str) -> dict[str, float]:
    """Metrics on a split; those of the validation rows stand where the last step was validated already."""
    task = run.session.task
    last = next((entry for entry in reversed(trainer.state.log_history) if "eval_loss" in entry), None)
    current = last is not None and last["step"] == trainer.state.global_step
    current = current and (bool(run.session.by_label) or not task.named)  # not after a restart
    if name == "validation" and last is not None and current and not trainer.args.load_best_model_at_end:
        return task.of_trainer({key.replace("eval_", f"{name}_", 1): value for key, value in last.items()}, name)
    with run.screen.console.status(f"evaluating on the {name} rows"):
        return task.of_trainer(trainer.evaluate(run.examples[name], metric_key_prefix=name), name)
