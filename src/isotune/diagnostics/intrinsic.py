"""How many dimensions a task takes of a part of the model: its local intrinsic dimension, found by a sweep.

    θ = θ0 + P z,   z (D) trained, P (N x D) random and fixed
    d_90 = the least D for which the score is 90 % of what training all N weights of the part gives

Every other weight stays as it was. Parts that get by with few dimensions are where a small adapter may do, and
KAdaptation picks the modules that it adapts so. It is an offline tool: each D is a training of its own. P is never
formed (`linalg/sign_projection.py`), and scaled to rows of length one, so that a step of Adam, and in expectation one
of gradient descent, moves a weight as far as it does where all are trained: one learning rate suits every D.

After: Li, Farkhoor, Liu and Yosinski, "Measuring the Intrinsic Dimension of Objective Landscapes", ICLR 2018, arXiv
1804.08838; He, Li, Zhang, Yang and Wang, "Parameter-efficient Model Adaptation for Vision Transformers", AAAI 2023,
arXiv 2203.16329, whose code leaves the measure out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from isotune.errors import IsotuneError, OptionError, TargetError
from isotune.linalg.sign_projection import project, random_signs
from isotune.matrix import Matrix
from isotune.model.names import changed_modules
from isotune.model.targets import Targets, find_modules, find_targets

DIMENSIONS = (10, 30, 100, 300, 1000, 3000, 10000)
Train = Callable[[nn.Module], float]
Places = dict[nn.Parameter, list[tuple[nn.Module, str]]]
"""Parameters, each with the modules that hold it and its name there: several where it is tied."""


@dataclass(frozen=True)
class IntrinsicDimension:
    """What `intrinsic_dimension` found for one group."""

    parameters: int
    """N: the weights of the group."""
    full: float
    """The score where all of them are trained."""
    share: float
    """Of the full score, what has to be reached."""
    scores: dict[int, float] = field(default_factory=dict)
    """By D, in rising order, up to the first that reaches it."""

    @property
    def d(self) -> int | None:
        """The least D that reaches it, `d_90` for a share of 0.9; None where none of those tried does."""
        return next((D for D, score in self.scores.items() if score >= self.share * self.full), None)


def intrinsic_dimension(
    model: nn.Module,
    groups: Mapping[str, Targets],
    train: Train,
    dimensions: Sequence[int] = DIMENSIONS,
    *,
    share: float = 0.9,
    train_also: Iterable[str] = (),
    seed: int = 0,
) -> dict[str, IntrinsicDimension]:
    """Find for groups of layers the least D in which training reaches a share of the group's full score.

    All trainings start from the model as it is, with the same seed of torch's. Nothing stays changed in it.

    Args:
        model: A model without adapters.
        groups: By a name of your own the layers of a group, as `isotune.adapt` takes targets; a module that is named
            counts with all that is in it.
        train: Trains the parameters of the model that require gradients, and those alone, and gives a score: above
            zero, and larger for a better model, such as an accuracy.
        dimensions: The D to try. They are tried in rising order up to the first that does; those that are not below
            the number of a group's weights are left out.
        share: Of the full score, what has to be reached.
        train_also: Modules, such as a new head, that are trained as they are in every one of the trainings.
        seed: Of the projection and of torch's random numbers in each training.

    Raises:
        OptionError: There is no group or no dimension, or one that means nothing.
        TargetError: A group matches nothing, or nothing that could be trained.
        IsotuneError: The model has adapters, or `train` changes nothing or gives no score that a share can be of.
    """
    _check(groups, dimensions, share)
    if next(changed_modules(model), None) is not None:
        raise IsotuneError("the model has adapters, and its own weights are measured: isotune.remove them first")
    also = [p for module in find_modules(model, train_also).values() for p in module.parameters()]
    places = {name: _places(model, name, targets, also) for name, targets in groups.items()}
    found = {}
    for name, own in places.items():
        size = sum(p.numel() for p in own)
        with _training(model, [*own, *also]):
            full = _score(model, train, list(own), seed)
        if not 0 < full < math.inf:
            raise IsotuneError(
                f"group {name!r}, trained in full, has a score of {full:g}, of which {share:g} is no aim: let train "
                "give a score above zero that is larger for a better model, such as an accuracy"
            )
        found[name] = IntrinsicDimension(size, full, share)
        for D in sorted({D for D in dimensions if size > D}):
            with _training(model, also), _projected(own, D, seed) as z:
                found[name].scores[D] = _score(model, train, [z], seed)
            if found[name].d is not None:
                break
    return found


class Projected(nn.Module):
    """W becomes `W + P z`, for the rows of P that are W's, scaled to length one."""

    S: Tensor
    T: Tensor

    def __init__(self, z: nn.Parameter, W: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        self.z = z
        for name, signs in zip("ST", random_signs(W.numel(), len(z), generator), strict=True):
            self.register_buffer(name, signs.to(W.device), persistent=False)

    def forward(self, W: Tensor) -> Tensor:
        """The changed weight, in W's shape (...) and dtype."""
        change = project(self.z.to(W.device), self.S, self.T) / math.sqrt(len(self.z))
        return (W + change.view_as(W)).to(W.dtype)


def _check(groups: Mapping[str, Targets], dimensions: Sequence[int], share: float) -> None:
    if not groups:
        raise OptionError('no group of layers is named: give some, such as {"attention": "attention", "mlp": "mlp"}')
    if not dimensions or min(dimensions) < 1:
        raise OptionError(f"dimensions={[*dimensions]} is not usable: give numbers of at least one")
    if not 0 < share <= 1:
        raise OptionError(f"share={share:g} is not usable: it is above zero and at most one")


def _places(model: nn.Module, group: str, targets: Targets, also: Sequence[Tensor]) -> Places:
    """The parameters of a group, but for those that are trained in any case."""
    layers = find_targets(model, targets, kinds=("block", "norm")).values()
    own = [p for m in layers for p in ([m.parameter] if isinstance(m, Matrix) else m.parameters())]
    wanted = {id(p) for p in own if p.is_floating_point()} - {id(p) for p in also}
    if not wanted:
        raise TargetError(
            f"group {group!r} ({targets!r}) has no weights to train: they are quantised, or in train_also"
        )
    found: Places = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and id(p) in wanted:
                found.setdefault(p, []).append((module, name))
    return found


@contextmanager
def _projected(own: Places, D: int, seed: int) -> Iterator[nn.Parameter]:
    """Let z (D), which is given, move these parameters, and nothing else."""
    device = next(iter(own)).device
    z = nn.Parameter(torch.zeros(D, device=device))
    generator = torch.Generator().manual_seed(seed)
    orders = {module: list(module._parameters) for places in own.values() for module, _ in places}
    placed: list[tuple[nn.Module, str]] = []
    try:
        for p, places in own.items():
            move = Projected(z, p, generator)
            for module, name in places:
                parametrize.register_parametrization(module, name, move)
                placed.append((module, name))
        yield z
    finally:
        for module, name in placed:
            parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        for module, order in orders.items():
            for name in order:
                module._parameters[name] = module._parameters.pop(name)


@contextmanager
def _training(model: nn.Module, trained: Iterable[Tensor]) -> Iterator[None]:
    """Let these parameters alone train; afterwards they, all buffers and the state of the model are as they were."""
    trained = list(trained)
    values = [(t, t.detach().clone()) for t in (*model.buffers(), *trained)]
    modes = [(module, module.training, dict(module._buffers)) for module in model.modules()]
    states = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    for p, _, _ in states:
        p.requires_grad_(False)
        p.grad = None
    for weight in trained:
        weight.requires_grad_(True)
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)
        for p, requires, gradient in states:
            p.requires_grad_(requires)
            p.grad = gradient
        for module, mode, buffers in modes:
            module.training = mode
            module._buffers.update(buffers)


def _score(model: nn.Module, train: Train, trained: Sequence[Tensor], seed: int) -> float:
    """The score of a training. Raises IsotuneError where it left alone what it was to train."""
    before = [t.detach().clone() for t in trained]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        score = float(train(model))
    if all(torch.equal(t, old) for t, old in zip(trained, before, strict=True)):
        raise IsotuneError(
            "train(model) left the weights as they were; let it give its optimizer "
            "[p for p in model.parameters() if p.requires_grad] of the model that it is called with, each time anew"
        )
    return score
