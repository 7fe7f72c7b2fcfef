"""Muon: momentum, with all its singular values brought to 1.

    M ← μ M + (1 - μ) G,   B = μ M + (1 - μ) G (Nesterov) or M,   W ← (1 - lr wd) W - lr s(m, n) orthogonalize(B)

The state is one matrix of momentum a parameter, half of Adam's. As `torch.optim.Muon`, with many small matrices
stepped together, kernels of convolutions seen as (out, rest), and vectors stepped by AdamW in the same optimizer.

Sources: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024; the scale match_rms_adamw is
of "Muon is Scalable for LLM Training", 2025, arXiv 2502.16982.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from isotune.optim.batched import Group, Params, State
from isotune.optim.matrix import Adjustment, MatrixOptimizer, iteration, momentum
from isotune.optim.orthogonalize import Method, Polynomial


class Muon(MatrixOptimizer):
    """Momentum whose singular values are all brought to 1. Arguments and defaults are those of `torch.optim.Muon`.

    Args:
        params: Parameters, or groups of them.
        lr: The learning rate, times `adjust_lr_fn`'s factor for the shape; the weight decay has the bare rate.
        weight_decay: Decoupled, as AdamW's.
        momentum: μ.
        nesterov: Whether to look ahead.
        ns_coefficients: a, b and c of the iteration, in place of the method's.
        ns_steps: Its steps.
        adjust_lr_fn: "original" (and None), "match_rms_adamw", "spectral" or "rms"; see `isotune.optim.adjustment`.
        method: "newton-schulz", "polar-express" or "svd"; see `isotune.optim.orthogonalize`.
        ns_dtype: To iterate in, such as torch.bfloat16; by default fp32.
        process_group: Whose processes, each with the same gradients (DDP), share the work; by default none do.
    """

    algorithm: ClassVar[str] = "muon"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Polynomial | None = None,
        ns_steps: int = 5,
        adjust_lr_fn: Adjustment | None = None,
        method: Method = "newton-schulz",
        ns_dtype: torch.dtype | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov}
        defaults |= {"adjust_lr_fn": adjust_lr_fn} | iteration(method, ns_steps, ns_dtype, ns_coefficients)
        super().__init__(params, defaults, process_group)

    def direction(self, G: Tensor, batch: list[Tensor], state: State, group: Group) -> Tensor:
        B = momentum(G, state["momentum_buffer"], group["momentum"], group["nesterov"])
        return self.orthogonal(B, group)
