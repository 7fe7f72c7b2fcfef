"""Federated training of LoRA, simulated in one process: FedSVD, and FFA-LoRA and FedAvg to compare with.

In each round some clients start from the server's adapter and take a few steps of SGD on their own data; the server
averages what they send. FedSVD: clients train B, and every `period` rounds B A is factorised anew with an orthonormal
A (`isotune.training.refactorise`, with the paper). FFA-LoRA: `period=0`. FedAvg: `train_both=True`, the factors
averaged apart, which is not the average of their products.

With `clip`, each example's gradient is cut to that norm, over all layers together, before they are added up, and
`noise` puts Gaussian noise on the sum: DP-SGD, on examples drawn independently of each other, as the accountant
(`isotune.training.privacy`) demands. A gradient of one example is one backward pass of it: slow, but right for every
model. The random numbers are torch's, and the losses reported are the true ones: this shows what privacy costs, and
is no protection of data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from isotune.adapters.low_rank.lora import LoRAAdapter
from isotune.errors import DataError, DivergedError, OptionError
from isotune.model.names import adapted_layers
from isotune.options import Options
from isotune.training.privacy import epsilon
from isotune.training.refactorise import aggregate, refactorise

Rows = Mapping[str, Tensor]
"""A client's data, or a batch of it: tensors by name, their first dimension the examples."""
Loss = Callable[[nn.Module, dict[str, Tensor]], Tensor]
"""The mean loss of the examples in a batch, a scalar."""


class Federated(Options):
    """How rounds go; the defaults are those of the authors' scripts, without privacy."""

    name: ClassVar[str] = "federated"

    rounds: int = Field(100, gt=0, description="Rounds of training and averaging.")
    participation: float = Field(0.5, gt=0, le=1, description="Share of the clients in each round; at least one.")
    local_steps: int = Field(10, gt=0, description="Steps that a client takes in a round.")
    batch_size: int = Field(128, gt=0, description="Examples a step; their expected number where `clip` is given.")
    learning_rate: float = Field(0.5, gt=0, description="Learning rate of the clients' SGD.")
    period: int = Field(1, ge=0, description="Rounds from one re-factorisation to the next; 0 for none.")
    train_both: bool = Field(False, description="Train and average A as well as B.")
    clip: float | None = Field(None, gt=0, description="Largest norm of one example's gradient.")
    noise: float = Field(0.0, ge=0, description="Standard deviation of the noise, in units of `clip`.")
    delta: float = Field(1e-5, gt=0, lt=1, description="The delta at which epsilon is reported.")
    seed: int = Field(0, ge=0, description="Seed of the clients chosen, the batches and the noise.")

    @model_validator(mode="after")
    def _consistent(self) -> Federated:
        if self.noise and self.clip is None:
            raise OptionError(f"federated: noise={self.noise:g} is in units of clip; give the clip too")
        if self.train_both and self.period:
            raise OptionError(
                f"federated: train_both=True with period={self.period}: re-factorising is for clients that train B "
                "alone; set period=0 for FedAvg"
            )
        return self


class Round(NamedTuple):
    """What a round reports."""

    clients: tuple[int, ...]
    """Which took part, in the order of `clients`."""
    loss: float
    """Mean over the batches that were not empty; NaN where all were."""
    epsilon: float | None
    """Of the client that has lost most privacy so far; None without noise."""


def federated_rounds(model: nn.Module, clients: Sequence[Rows], loss: Loss, options: Federated) -> Iterator[Round]:
    """Train the model's active LoRA adapters, and modules trained in full, in place, a round for each item taken.

    Args:
        model: A model with adapters, in the mode (dropout or not) in which it is to be trained. Its buffers are left
            to its own code: a batch norm that is not in evaluation mode would carry data past averaging and noise.
        clients: The clients' data, on the model's device.
        loss: Called with the model and a batch.
        options: How rounds go.

    Raises:
        OptionError: An adapter that is not LoRA, or whose A is zero (embeddings) and would keep B from learning.
        DataError: No client, one without examples, or tensors of different lengths.
        DivergedError: A loss that is not finite, while iterating.
    """
    adapters = _adapters(model, options)
    sizes = [_size(rows, number) for number, rows in enumerate(clients)]
    if not sizes:
        raise DataError("federated training needs at least one client; none was given")
    frozen = set() if options.train_both else {id(adapter.A) for adapter in adapters}
    trained = [p for p in model.parameters() if p.requires_grad and id(p) not in frozen]
    generator = torch.Generator().manual_seed(options.seed)
    return _rounds(_Local(model, loss, trained, options, generator), clients, sizes, adapters)


class _Local(NamedTuple):
    """A client's training, on the server's model."""

    model: nn.Module
    loss: Loss
    trained: list[nn.Parameter]
    options: Federated
    generator: torch.Generator

    def train(self, rows: Rows, size: int) -> list[float]:
        """Take the client's steps; returns the losses of the batches that were not empty."""
        losses = []
        for _ in range(self.options.local_steps):
            step = self._average if self.options.clip is None else self._private
            gradients, values = step(rows, size)
            with torch.no_grad():
                for parameter, gradient in zip(self.trained, gradients, strict=True):
                    parameter.sub_(gradient, alpha=self.options.learning_rate)
            losses += [sum(values) / len(values)] if values else []
        return losses

    def _average(self, rows: Rows, size: int) -> tuple[list[Tensor], list[float]]:
        """The gradient of a batch without repetition."""
        batch = torch.randperm(size, generator=self.generator)[: self.options.batch_size]
        value, gradients = self._gradient(rows, batch)
        return gradients, [value]

    def _private(self, rows: Rows, size: int) -> tuple[list[Tensor], list[float]]:
        """The clipped and noisy gradient of a Poisson sample, and the loss of each example in it."""
        clip, rate = self.options.clip or 0.0, _rate(self.options, size)
        total, values = [torch.zeros_like(p) for p in self.trained], []
        for example in (torch.rand(size, generator=self.generator) < rate).nonzero():
            value, gradients = self._gradient(rows, example)
            norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
            for own, gradient in zip(total, gradients, strict=True):
                own.add_(gradient, alpha=clip / max(clip, norm))
            values.append(value)
        for own in total:
            if self.options.noise:
                normal = torch.randn(own.shape, generator=self.generator, dtype=own.dtype)
                own.add_(normal.to(own.device), alpha=self.options.noise * clip)
            # The expected number of examples: the number drawn would tell of the data.
            own.div_(rate * size)
        return total, values

    def _gradient(self, rows: Rows, batch: Tensor) -> tuple[float, list[Tensor]]:
        """The mean loss of a batch, of the given indices, and its gradient."""
        value = self.loss(self.model, {name: tensor[batch.to(tensor.device)] for name, tensor in rows.items()})
        if not value.isfinite().all():
            raise DivergedError(
                f"a client's loss is {float(value.detach())}: lower the learning rate, {self.options.learning_rate:g}"
            )
        found = torch.autograd.grad(value, self.trained, allow_unused=True, materialize_grads=True)
        return float(value.detach()), list(found)


def _rounds(local: _Local, clients: Sequence[Rows], sizes: list[int], adapters: list[LoRAAdapter]) -> Iterator[Round]:
    options, trained = local.options, local.trained
    steps = [0] * len(sizes)
    for number in range(1, options.rounds + 1):
        count = max(1, round(options.participation * len(sizes)))
        chosen = torch.randperm(len(sizes), generator=local.generator)[:count].tolist()
        start, sent, losses = _copies(trained), [], []
        for client in chosen:
            _assign(trained, start)
            losses += local.train(clients[client], sizes[client])
            sent.append(_copies(trained))
            steps[client] += options.local_steps
        weights = [sizes[client] for client in chosen]
        _assign(trained, [aggregate(tensors, weights) for tensors in zip(*sent, strict=True)])
        if options.period and number % options.period == 0:
            for adapter in adapters:
                _assign([adapter.B, adapter.A], refactorise(adapter.B.detach(), adapter.A.detach()))
        mean = sum(losses) / len(losses) if losses else math.nan
        yield Round(tuple(chosen), mean, _spent(steps, sizes, options) if options.noise else None)


def _rate(options: Federated, size: int) -> float:
    return min(1.0, options.batch_size / size)


def _spent(steps: list[int], sizes: list[int], options: Federated) -> float:
    """The largest ε of a client, by the steps that it took: the server knows when it took none."""
    spent = {(count, _rate(options, size)) for count, size in zip(steps, sizes, strict=True)}
    return max(epsilon(options.noise, rate, count, options.delta) for count, rate in spent)


def _copies(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


@torch.no_grad()
def _assign(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _adapters(model: nn.Module, options: Federated) -> list[LoRAAdapter]:
    found = []
    for path, layer in adapted_layers(model):
        if layer.isotune.folded:
            raise OptionError(f"the adapter on {path!r} is folded into the weight; call unfold first")
        for adapter in layer.isotune.running():
            if type(adapter) is not LoRAAdapter:
                raise OptionError(f"federated training is for lora; {path!r} has an adapter of {adapter.method!r}")
            if not options.train_both and not adapter.A.any():
                raise OptionError(
                    f"A of the adapter on {path!r} is zero, as at the start on an embedding, so that B alone learns "
                    "nothing; leave the layer out, or set train_both=True and period=0"
                )
            found.append(adapter)
    if not found:
        raise OptionError("the model has no active adapter; call isotune.adapt(model, LoRA(...)) first")
    return found


def _size(rows: Rows, number: int) -> int:
    lengths = {name: len(tensor) for name, tensor in rows.items()}
    if len(set(lengths.values())) != 1 or not all(lengths.values()):
        raise DataError(f"client {number} needs tensors of one length above zero; found {lengths}")
    return next(iter(lengths.values()))


def dirichlet_split(labels: Tensor, clients: int, concentration: float, seed: int = 0) -> list[Tensor]:
    """The indices of each client's examples, for labels (n): each class shared out by a draw from a Dirichlet.

    The smaller the concentration (the paper has 0.5), the more the clients' classes differ. It is drawn again until
    each client has an example. Raises OptionError where that does not come about.
    """
    draw = np.random.default_rng(seed)
    for _ in range(100):
        parts: list[list[Tensor]] = [[] for _ in range(clients)]
        for label in labels.unique():
            own = (labels.cpu() == label.cpu()).nonzero().flatten()
            own = own[torch.from_numpy(draw.permutation(len(own)))]
            ends = (np.cumsum(draw.dirichlet([concentration] * clients))[:-1] * len(own)).round().astype(int)
            for part, piece in zip(parts, own.tensor_split(torch.from_numpy(ends)), strict=True):
                part.append(piece)
        split = [torch.cat(part) for part in parts]
        if all(len(part) for part in split):
            return split
    raise OptionError(
        f"{len(labels)} examples at a concentration of {concentration:g} leave some of {clients} clients without "
        "any; take fewer clients or a larger concentration"
    )
