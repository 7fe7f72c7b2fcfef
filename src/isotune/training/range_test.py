"""`learning_rate: auto`: a short range test on the training rows, before the run, finds the rate.

The rate rises from far too small to far too large, one step at each, evenly in its logarithm. What counts is the
gain: how much lower a batch's loss is, before its own step, than it was for the untrained model under the same
dropout. It is taken batch by batch, for batches differ by more than a short test gains. The gain rises with the rate,
has a top, or a plateau, and falls off a cliff. The rate taken is half of the first with four fifths of the largest
gain: further on along a plateau nothing more is gained, and more of what the model knew is lost.

What trains is put back afterwards, and the random state is left as it was. Each step costs a third more than one of
training. After: Smith, "Cyclical Learning Rates for Training Neural Networks", 2017, arXiv 1506.01186.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import broadcast_object_list
from torch import nn

from isotune.checkpoint.files import write_atomically
from isotune.errors import IsotuneError
from isotune.folders import RANGE_TEST
from isotune.training.progress import Screen, is_first_process

STEPS = 60
_LOW, _HIGH = 0.01, 20.0
"""In multiples of the method's own rate."""
_SMOOTH = 0.8
"""Weight of what went before in the running mean of the gains."""
_FALL = 0.1
"""Past the cliff the gain is as far below zero as it had risen above, and by this share of the loss lower still: more
than a batch that is unlike the others makes it."""
_MOST = 0.8
"""Share of the largest gain that counts as having it."""
_BACK = 2.0
"""The first rate with most of the gain is so many times the one taken: a training is longer than a test."""


class RangeTest(NamedTuple):
    """What it found, as it is kept in the run's folder."""

    rate: float
    rates: list[float]
    gains: list[float]
    """Of the batches, by how much the loss had fallen before the step at each rate."""


def range_test(trainer: Any, own_rate: float, steps: int | None = None) -> RangeTest:
    """Find a learning rate for what the trainer is about to train; nothing is left changed.

    Args:
        trainer: An `AdapterTrainer` that has not begun.
        own_rate: The method's own rate, around which to look.
        steps: How many batches to take; by default 60, or a third of the training where that is less, but 20 or more.

    Raises:
        IsotuneError: Nothing is learned at any rate, or the parameters are sharded.
    """
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise IsotuneError("training.learning_rate: auto does not go with fsdp or deepspeed; give a number")
    batches = _batches(trainer)
    with torch.random.fork_rng(), _put_back(trainer.model):
        if steps is None:
            steps = max(20, min(STEPS, _planned(trainer) // 3))
        found = _curve(trainer, own_rate, [next(batches) for _ in range(steps)])
    rate = chosen(*found)
    if rate is None:
        raise IsotuneError(
            "training.learning_rate: auto found no rate at which the loss of the training rows falls; give a number, "
            "or look at the rows"
        )
    (result,) = broadcast_object_list([RangeTest(rate, found[0], found[1])])
    assert isinstance(result, RangeTest)
    return result


def _curve(trainer: Any, own_rate: float, batches: list[Any]) -> tuple[list[float], list[float], float]:
    """The rates, the gain before the step at each, and the mean loss before all."""
    trainer.args.learning_rate = own_rate
    optimizer = trainer.create_optimizer()
    own = [group["lr"] for group in optimizer.param_groups]
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    trainer.model.train()
    with torch.no_grad():
        before = [float(_loss(trainer, inputs, seed)) for seed, inputs in enumerate(batches)]
    rates: list[float] = []
    gains: list[float] = []
    scale = sum(before) / len(before)
    for step, inputs in enumerate(batches):
        multiple = _LOW * (_HIGH / _LOW) ** (step / (len(batches) - 1))
        for group, rate in zip(optimizer.param_groups, own, strict=True):
            group["lr"] = rate * multiple
        optimizer.zero_grad()
        loss = _loss(trainer, inputs, step)
        if not bool(loss.isfinite()):
            break
        rates.append(own_rate * multiple)
        gains.append(before[step] - float(loss.detach()))
        if _fallen(smoothed(gains), scale):
            break
        loss.backward()
        if trainer.args.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(trained, trainer.args.max_grad_norm)
        optimizer.step()
    trainer.optimizer = None
    return rates, gains, scale


def chosen(rates: list[float], gains: list[float], scale: float) -> float | None:
    """The rate for a curve, rounded to two digits; None where nothing was gained. `scale` is the loss at first."""
    smooth = smoothed(gains)
    end = next((step for step in range(len(smooth)) if _fallen(smooth[: step + 1], scale)), len(smooth))
    most = _MOST * max(smooth[:end], default=0.0)
    first = next((rate for rate, gain in zip(rates, smooth, strict=True) if gain >= most > 0), None)
    return None if first is None else float(f"{first / _BACK:.2g}")


def _fallen(smooth: list[float], scale: float) -> bool:
    """Whether the last gain is past the cliff."""
    return smooth[-1] < -max(0.0, *smooth) - _FALL * abs(scale)


def smoothed(gains: list[float]) -> list[float]:
    """Running means, with the bias of the start corrected."""
    mean, found = 0.0, []
    for step, gain in enumerate(gains, start=1):
        mean = _SMOOTH * mean + (1 - _SMOOTH) * gain
        found.append(mean / (1 - _SMOOTH**step))
    return found


def _planned(trainer: Any) -> int:
    """The steps of the training."""
    if trainer.args.max_steps > 0:
        return int(trainer.args.max_steps)
    batches = len(trainer.get_train_dataloader()) // trainer.args.gradient_accumulation_steps
    return int(max(1, batches) * trainer.args.num_train_epochs)


def _batches(trainer: Any) -> Iterator[Any]:
    while True:
        yield from trainer.get_train_dataloader()


def _loss(trainer: Any, inputs: Any, seed: int) -> torch.Tensor:
    """Of a batch, with the same dropout for the same seed."""
    torch.manual_seed(seed)
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(dict(inputs)))
    assert isinstance(loss, torch.Tensor)
    return loss


@contextmanager
def _put_back(model: nn.Module) -> Iterator[None]:
    """Leave what trains, and all buffers, as they were."""
    mode = model.training
    changes = [*model.buffers(), *(p for p in model.parameters() if p.requires_grad)]
    values = [t.detach().clone() for t in changes]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(changes, values, strict=True):
                tensor.copy_(value)
        model.zero_grad(set_to_none=True)
        model.train(mode)


def found_rate(trainer: Any, folder: Path, own_rate: float, screen: Screen) -> float:
    """The rate for a run in this folder, which the trainer has from then on; found once, and kept there."""
    found = kept_range_test(folder)
    if found is None:
        with screen.console.status("range test: a learning rate for these rows"):
            found = range_test(trainer, own_rate)
        if is_first_process():
            write_atomically(folder / RANGE_TEST, json.dumps(found._asdict()) + "\n")
    screen.say(f"learning rate {found.rate:g}, found by a range test of {len(found.rates)} steps")
    trainer.args.learning_rate = found.rate
    return found.rate


def kept_range_test(folder: Path) -> RangeTest | None:
    """What a run's folder holds of its range test; None where it had none. Raises IsotuneError for a damaged file."""
    file = folder / RANGE_TEST
    if not file.is_file():
        return None
    try:
        return RangeTest(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise IsotuneError(f"{file} cannot be read: {error}") from None
