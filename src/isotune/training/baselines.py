"""What the scores of a run are against: saying always the same, a linear probe, the model before it was trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import isotune
from isotune.checkpoint.files import write_atomically
from isotune.model.switch import adapter_names
from isotune.training.probe import Probe
from isotune.training.start import split_features
from isotune.training.tasks.collator import Example

if TYPE_CHECKING:
    from isotune.training.data import Splits
    from isotune.training.folder import RunFolder
    from isotune.training.progress import Screen
    from isotune.training.session import Session
    from isotune.training.trainer import AdapterTrainer

MEASURED = ("validation", "test")


def constant_scores(session: Session, splits: Splits) -> dict[str, float]:
    """What the commonest training label, or the mean, scores on the validation and the test rows."""
    rows = {name: getattr(splits, name) for name in MEASURED}
    return {
        f"{name}_{key}": value
        for name, part in rows.items()
        if part
        for key, value in session.task.constant(splits.train, part).items()
    }


def measured_baselines(
    session: Session,
    trainer: AdapterTrainer,
    examples: Mapping[str, list[Example]],
    probe: Probe | None,
    screen: Screen,
) -> dict[str, float]:
    """What the linear probe scores, where there is one, and a model without a head before it is trained."""
    found = {} if probe is None else _probe_scores(session, probe, examples, screen)
    return found | _base_scores(session, trainer, examples, screen)


def _probe_scores(
    session: Session, probe: Probe, examples: Mapping[str, list[Example]], screen: Screen
) -> dict[str, float]:
    """What the linear probe scores, as it was on the validation rows, and on the features of the test rows."""
    metric = session.spec.judged_by
    found = {f"validation_probe_{metric}": probe.validation[metric]} if probe.validation else {}
    if examples["test"]:
        with isotune.disabled(session.model):
            features = split_features(session, {"test": examples["test"]}, screen)
        found[f"test_probe_{metric}"] = probe.metrics(*features["test"])[metric]
    return found


def _base_scores(
    session: Session, trainer: AdapterTrainer, examples: Mapping[str, list[Example]], screen: Screen
) -> dict[str, float]:
    """What a model without a head does before it is trained: on the test rows, else the validation rows."""
    name = next((name for name in reversed(MEASURED) if examples[name]), None)
    if name is None or session.head or session.task.has_reference or trainer.args.world_size > 1:
        return {}
    with (
        isotune.disabled(session.model) if adapter_names(session.model) else nullcontext(),
        screen.console.status(f"the model before training, on the {name} rows"),
    ):
        found = trainer.predict(examples[name], metric_key_prefix="before").metrics
    scores = session.task.of_trainer(found, "before")
    return {f"{name}_base_{key.removeprefix('before_')}": value for key, value in scores.items()}


def keep(folder: RunFolder, scores: Mapping[str, float]) -> None:
    """Write them into the run's folder, for the end of a run that is stopped and resumed."""
    write_atomically(folder.baselines_file, json.dumps(dict(scores), indent=2) + "\n")


def kept(folder: RunFolder) -> dict[str, Any]:
    """Read them back; none where the run began without."""
    return json.loads(folder.baselines_file.read_text()) if folder.baselines_file.is_file() else {}
