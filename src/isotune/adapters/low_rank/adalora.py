"""AdaLoRA, adaptive budget allocation: triplets like those of an SVD, of which the least important are given up.

    W' = W + s P diag(λ) Q,   P (out x r), Q (r x in), λ = 0 at the start,   s = alpha / (r + 1e-5)
    penalty  γ (|PᵀP - I|_F + |Q Qᵀ - I|_F) / 2

All matrices of the model together start with more ranks than they are to keep. What a number is worth is |w ∂L/∂w|,
smoothed over steps, times how much that varies, smoothed; what a triplet is worth, λ's own and the means over its two
vectors. From a `warmup` on the number of ranks falls as a cubic to the share `keep`, and the λ of all other triplets,
over all layers, are set to zero; gradients may bring them back until the last `final` share of the training, in which
ranks do not change any more. What is exported is a LoRA with the ranks that are left.

Paper: "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", ICLR 2023, arXiv 2303.10512.
Parameters: r (in + out + 1), and twice as many numbers that are kept while training. Cost for n rows:
2 n r (in + out) flops. It ranks exactly as many triplets as it says: PEFT gives up all that tie with the last one,
which at the start are all. PEFT weighs its penalty by the mean over all matrices, here it is a term for each layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from isotune.adapters.contract import check_tensors
from isotune.adapters.low_rank.gated import Gated
from isotune.adapters.settings import Settings, by_schedule, check_rank
from isotune.errors import IsotuneError, OptionError
from isotune.linalg.triplets import orthonormality_error
from isotune.sites import LINEAR, Site

_NAMES = MappingProxyType({"A": "lora_A", "B": "lora_B", "g": "lora_E"})


class AdaLoRA(Settings):
    """W' = W + s P diag(λ) Q: triplets, of which those that matter least are given up during training."""

    name: ClassVar[str] = "adalora"
    kinds: ClassVar[frozenset[str]] = LINEAR | {"conv2d"}
    learning_rate: ClassVar[float] = 1e-2
    formula: ClassVar[str] = "rank * (n_in + n_out + 1)"
    dialect: ClassVar[str] = "isotune.adapters.peft.adalora:AdaLoRADialect"

    rank: int = Field(12, gt=0, description="Ranks of a matrix at the start.")
    keep: float = Field(2 / 3, gt=0, le=1, description="Share of all ranks, over all layers, to be left.")
    alpha: float | None = Field(None, gt=0, description="Numerator of the scale s; the default makes s one.")
    warmup: float = Field(0.1, ge=0, le=1, description="Share of the training before ranks are given up.")
    final: float = Field(0.3, ge=0, le=1, description="Share of the training, at its end, with ranks that stay.")
    interval: int = Field(1, gt=0, description="Steps from one choice of ranks to the next.")
    beta1: float = Field(0.85, gt=0, lt=1, description="How much of a number's worth is kept from step to step.")
    beta2: float = Field(0.85, gt=0, lt=1, description="How much of its variation is kept from step to step.")
    gamma: float = Field(0.01, ge=0, description="Weight of the penalty that keeps P and Q orthonormal.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the input of Q while training.")

    def model_post_init(self, _: object) -> None:
        if self.warmup + self.final >= 1:
            raise OptionError(
                f"adalora: warmup={self.warmup} and final={self.final} leave no time to give up ranks in; their sum "
                "must be below 1"
            )

    def build(self, site: Site, generator: torch.Generator) -> AdaLoRAAdapter:
        check_rank(self.rank, min(site.in_features, site.out_features), "its smaller side")
        A = 0.02 * torch.randn(self.rank, site.in_features, generator=generator)
        B = 0.02 * torch.randn(site.out_features, self.rank, generator=generator)
        return AdaLoRAAdapter(A, B, self)

    def budget(self, progress: float, ranks: int) -> int:
        """How many of these ranks are left when this share of the training is done."""
        left = 1 - (progress - self.warmup) / (1 - self.final - self.warmup)
        target = max(1, round(self.keep * ranks))
        return int(target + (ranks - target) * min(max(left, 0.0), 1.0) ** 3 + 1e-9)

    def parameter_count(self, site: Site) -> int:
        return self.rank * (site.in_features + site.out_features + 1)


class AdaLoRAAdapter(Gated):
    """Holds Q as A (r x in), P as B (out x r), λ as g (r), and what each number is worth."""

    method = "adalora"
    memory = frozenset({"steps", *(f"{what}_{name}" for what in ("worth", "variation") for name in _NAMES)})
    steps: Tensor

    def __init__(self, A: Tensor, B: Tensor, settings: AdaLoRA) -> None:
        r = len(A)
        super().__init__(A, B, torch.zeros(r), (settings.alpha or r + 1e-5) / (r + 1e-5), settings.dropout)
        self.settings = settings
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        for name in _NAMES:
            for what in ("worth", "variation"):
                self.register_buffer(f"{what}_{name}", torch.zeros_like(getattr(self, name)))

    def penalty(self, site: Site) -> Tensor:
        if not self.settings.gamma:
            return super().penalty(site)
        return self.settings.gamma * (orthonormality_error(self.A.mT) + orthonormality_error(self.B)) / 2

    def measure(self) -> None:
        """Take the gradients of the last step into account."""
        beta1, beta2 = self.settings.beta1, self.settings.beta2
        for name in _NAMES:
            own = getattr(self, name)
            seen = torch.zeros_like(own) if own.grad is None else (own * own.grad).abs()
            worth = getattr(self, f"worth_{name}").lerp_(seen, 1 - beta1)
            getattr(self, f"variation_{name}").lerp_((seen - worth).abs(), 1 - beta2)

    def scores(self) -> Tensor:
        """What each triplet is worth (r)."""
        A, B, g = (getattr(self, f"worth_{name}") * getattr(self, f"variation_{name}") for name in _NAMES)
        return g + A.mean(1) + B.mean(0)

    @classmethod
    def after_steps(cls, adapters: Mapping[Self, Site], progress: float) -> Sequence[nn.Parameter]:
        for group in by_schedule(adapters):
            _give_up(group, progress)
        return ()

    def peft_state(self, site: Site) -> dict[str, Tensor]:
        own = {stored: getattr(self, name).detach() for name, stored in _NAMES.items()}
        return own | {"lora_E": self.g.detach()[:, None]}

    def load_peft_state(self, tensors: dict[str, Tensor], site: Site) -> None:
        own = self.peft_state(site)
        r = len(tensors["lora_E"]) if tensors.get("lora_E", self.g).dim() == 2 else len(self.g)
        if r > len(self.g):
            raise ValueError(f"lora_E has {r} rows, expected at most {len(self.g)}")
        own = {name: t[:, :r] if name == "lora_B" else t[:r] for name, t in own.items()}
        check_tensors(tensors, {name: tuple(tensor.shape) for name, tensor in own.items()})
        self.g.detach().zero_()  # PEFT leaves out the ranks that were given up
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def _give_up(adapters: Sequence[AdaLoRAAdapter], progress: float) -> None:
    """Measure what triplets are worth and, when it is time, keep as many as the budget has."""
    settings = adapters[0].settings
    ends = progress >= 1 - settings.final
    if not ends:
        if all(p.grad is None for adapter in adapters for p in adapter.parameters()):
            raise IsotuneError(
                "adalora ranks by gradients, and there are none: call isotune.after_step between optimizer.step() "
                "and optimizer.zero_grad()"
            )
        for adapter in adapters:
            adapter.measure()
            adapter.steps += 1
    if not ends and (progress <= settings.warmup or int(adapters[0].steps) % settings.interval):
        return
    scores = torch.cat([adapter.scores() for adapter in adapters])
    if not scores.any():  # nothing was measured
        return
    given_up = scores.argsort(descending=True, stable=True)[settings.budget(progress, len(scores)) :]
    left = torch.ones_like(scores)
    left[given_up] = 0
    for adapter, own in zip(adapters, left.split([len(adapter.g) for adapter in adapters]), strict=True):
        adapter.g.data.mul_(own)
