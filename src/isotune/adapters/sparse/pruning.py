"""Adapting by pruning: weights keep their values or are left out, and which of them is what is learned.

    W' = W ∘ M,   M in {0, 1};   dL/dQ = (dL/dW' ∘ W) σ'(Q / τ) / τ,   M the largest of the scores Q

Over the training the share of weights left out rises to `sparsity`, of all layers together, as a cubic until the
share `ramp` of the training is over. "learned" scores pass the gradient of M straight through a sigmoid, also to
weights that are left out, which may come back. "greedy" ones sum up what a step says that leaving a weight out gains,
to first order, and leave out what gains most, for good. Two adapters used together leave out what either does.

Paper: "Adapting by Pruning: A Case Study on BERT", 2021, arXiv 2105.03343, of which no code was found: the training
of the scores is as in related work on masks. Parameters: in x out scores while training; one bit a weight is stored.
Cost: one product of the size of W in each pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from isotune.adapters.contract import WeightAdapter, check_tensors
from isotune.adapters.settings import Settings, by_schedule
from isotune.linalg.sparse import largest_of_all, packed_bits, unpacked_bits
from isotune.sites import CONVOLUTIONS, LINEAR, Site


class AdaptByPruning(Settings):
    """W' = W ∘ M: a learned choice of the weights that stay."""

    name: ClassVar[str] = "pruning"
    kinds: ClassVar[frozenset[str]] = LINEAR | CONVOLUTIONS
    learning_rate: ClassVar[float] = 1e-2
    formula: ClassVar[str] = "n_in * n_out"
    size_option: ClassVar[str | None] = None
    exempt: ClassVar[dict[str, str]] = {
        "seeds_decide_the_start": "all weights are there at the start; nothing is drawn",
        "gradients_are_derivatives": "the choice is a step, through which the gradient of a sigmoid is passed",
    }

    sparsity: float = Field(0.1, gt=0, lt=1, description="Share of the weights, over all layers, to leave out.")
    scores: Literal["learned", "greedy"] = Field(
        "learned", description="Scores from which weights come back, or gains summed up, by which they go for good."
    )
    ramp: float = Field(0.7, gt=0, le=1, description="Share of the training after which all of these are left out.")
    interval: int = Field(1, gt=0, description="Steps from one choice to the next.")
    start: float = Field(0.1, ge=0, le=3, description="What the scores start from.")
    temperature: float = Field(1.0, gt=0, description="The sigmoid's tau.")

    def build(self, site: Site, generator: torch.Generator) -> AdaptByPruningAdapter:
        return AdaptByPruningAdapter(torch.full((site.out_features, site.in_features), self.start), self)

    def share(self, progress: float) -> float:
        """The share of weights left out when this share of the training is done."""
        return self.sparsity * (1 - (1 - min(progress / self.ramp, 1)) ** 3)

    def parameter_count(self, site: Site) -> int:
        return site.in_features * site.out_features

    def kept_count(self, site: Site) -> int:
        return -(-site.in_features * site.out_features // 32)  # bits, in numbers of 32


class AdaptByPruningAdapter(WeightAdapter):
    """Holds the scores Q (out x in), the choice M (out x in) and the steps done."""

    method = "pruning"
    memory = frozenset({"Q", "steps"})
    M: Tensor
    steps: Tensor

    def __init__(self, Q: Tensor, settings: AdaptByPruning) -> None:
        super().__init__()
        self.Q = nn.Parameter(Q)
        self.register_buffer("M", torch.ones(Q.shape, dtype=torch.bool))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.settings = settings

    def weight(self, W: Tensor) -> Tensor:
        soft = self.Q if self.settings.scores == "greedy" else (self.Q / self.settings.temperature).sigmoid()
        # Exactly M, with the gradient of what is soft.
        return W * (self.M + (soft - soft.detach())).to(W.dtype)

    @classmethod
    def after_steps(cls, adapters: Mapping[Self, Site], progress: float) -> Sequence[nn.Parameter]:
        for adapter in adapters:
            adapter.steps += 1
        for group in by_schedule(adapters):
            _choose(group, progress)
        return ()

    def peft_state(self, site: Site) -> dict[str, Tensor]:
        return {"pruning_kept": packed_bits(self.M)}

    def load_peft_state(self, tensors: dict[str, Tensor], site: Site) -> None:
        check_tensors(tensors, {"pruning_kept": tuple(packed_bits(self.M).shape)})
        self.M.copy_(unpacked_bits(tensors["pruning_kept"], self.M.shape))
        start = self.settings.start or 1.0
        self.Q.detach().copy_(torch.where(self.M, start, -start))


def _choose(adapters: Sequence[AdaptByPruningAdapter], progress: float) -> None:
    """Leave out, over all of these layers, the weights with the lowest scores."""
    settings = adapters[0].settings
    if progress < 1 and int(adapters[0].steps) % settings.interval:
        return
    total = sum(adapter.M.numel() for adapter in adapters)
    scores = [adapter.Q.detach() for adapter in adapters]
    if settings.scores == "greedy":  # what was left out stays so
        scores = [score.masked_fill(~adapter.M, -torch.inf) for score, adapter in zip(scores, adapters, strict=True)]
    masks = largest_of_all(scores, total - round(settings.share(progress) * total))
    for adapter, mask in zip(adapters, masks, strict=True):
        adapter.M.copy_(mask)
