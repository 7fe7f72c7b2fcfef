"""The diagonal Fisher information of every parameter of a model, one example at a time.

What `fisher` does for adapted layers, which it tells apart within a batch, plain autograd does here for parameters of
any kind: embeddings, norms, a weight that is used twice. Cost: the backward passes of `fisher`, for each example.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from isotune.errors import IsotuneError
from isotune.linalg.precision import at_least_fp32
from isotune.model.batches import arguments_of, batch_bar, evaluating
from isotune.sites import device_of
from isotune.statistics.likelihood import Expectation, directions, scores_of


def parameter_fisher(
    model: nn.Module,
    examples: Iterable[Any],
    expectation: Expectation = "exact",
    *,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Tensor]:
    """The mean over examples of the expected squared gradient of `log p(y | x)` by every parameter.

    Args:
        model: Any model without adapters; it runs in evaluation mode, and nothing of it is changed.
        examples: Batches of one example each; see `isotune.statistics.fisher.fisher`.
        expectation: Over y, as there.
        seed: Of the labels drawn.
        progress: Whether to show a progress bar, on standard error where that is a terminal.

    Returns:
        By name, each parameter once, in its shape, in fp32 or better on the CPU.

    Raises:
        IsotuneError: No examples, a batch of more than one, or values that are not finite.
        OptionError: An expectation that the model or the batches do not allow.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    sums = {name: torch.zeros_like(at_least_fp32(p.detach())) for name, p in parameters.items()}
    frozen = [p for p in parameters.values() if not p.requires_grad]
    draw = torch.Generator().manual_seed(seed)
    seen = 0
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with (
            evaluating(model),
            torch.enable_grad(),
            batch_bar(examples, 1, progress, "Fisher information") as advance,
        ):
            for example in examples:
                args, named = arguments_of(example, device_of(model))
                labels = named.pop("labels", None)
                logits = scores_of(model(*args, **named))
                if len(logits) != 1:
                    raise IsotuneError(f"a batch holds {len(logits)} examples; give one at a time")
                turns = directions(logits.detach(), labels, named.get("attention_mask"), expectation, draw)
                for direction, last in turns:
                    found = torch.autograd.grad(
                        logits, list(parameters.values()), direction, retain_graph=not last, allow_unused=True
                    )
                    for total, gradient in zip(sums.values(), found, strict=True):
                        if gradient is not None:
                            total.add_(at_least_fp32(gradient).square())
                seen += 1
                advance()
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
    if not seen:
        raise IsotuneError("there are no examples to take the Fisher information over; give at least one")
    if wrong := [name for name, total in sums.items() if not total.isfinite().all()]:
        raise IsotuneError(f"the Fisher information of {wrong[0]!r} is not finite; look at the data and the model")
    return {name: (total / seen).cpu() for name, total in sums.items()}
