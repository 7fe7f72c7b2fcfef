"""Learning rates and weight decays of AdamW that carry over from a narrow model to a wide one of the same make.

    matrices, both of whose sides grow:   lr = lr₀ / ρ,   wd = wd₀ √ρ        ρ: how much wider the input is
    all else (norms, biases, embeddings): lr = lr₀,       wd = 0

so that the decay of a step, lr wd, falls as 1 / √ρ, with which the largest singular value stays what it is in the
narrow model. The exponent is a fit to what was measured, no theorem: pure noise alone would want another, for the
numbers' root mean square then becomes √(lr / 2 wd). The rule is for models trained from the start or in full; of
factors of adapters, only one side of which grows, it says nothing.

Paper: "Robust Layerwise Scaling Rules by Proper Weight Decay Tuning", 2025, arXiv 2510.15262.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def scaled_parameter_groups(
    model: nn.Module,
    base: nn.Module,
    lr: float,
    weight_decay: float,
    vector_lr: float | None = None,
    wd_exponent: float = 0.5,
) -> list[dict[str, Any]]:
    """Groups for `torch.optim.AdamW` with what was tuned on a narrow model, carried over to this one.

    Args:
        model: The model to train.
        base: The narrow model, whose parameters have the same names; it may be on the meta device.
        lr: The learning rate of the narrow one's matrices.
        weight_decay: Their weight decay.
        vector_lr: The learning rate of all else; by default `lr`.
        wd_exponent: e in wd₀ ρᵉ; with 1 the decay of a step does not depend on the width.

    Raises:
        ValueError: Parameters that the narrow model lacks, or has with other dimensions.
    """
    narrow = dict(base.named_parameters(remove_duplicate=False))
    found: dict[float | None, list[Tensor]] = {}
    for name, p in model.named_parameters():  # a tied matrix comes once
        if name not in narrow or narrow[name].dim() != p.dim():
            raise ValueError(f"the narrow model has no {name!r} of {p.dim()} dimensions to compare with")
        if p.requires_grad:
            found.setdefault(_wider(p, narrow[name]), []).append(p)
    return [
        {"params": params, "lr": lr if vector_lr is None else vector_lr, "weight_decay": 0.0}
        if rho is None
        else {"params": params, "lr": lr / rho, "weight_decay": weight_decay * rho**wd_exponent}
        for rho, params in found.items()
    ]


def _wider(p: Tensor, narrow: Tensor) -> float | None:
    """ρ of a matrix, None of all else. With the narrow model's own sizes every matrix counts as one."""
    if p.dim() < 2:
        return None
    ratios = [a / b for a, b in zip(p.shape[:2], narrow.shape[:2], strict=True)]
    if ratios == [1.0, 1.0]:
        return 1.0
    return ratios[1] if min(ratios) > 1 or max(ratios) < 1 else None


@torch.no_grad()
def top_singular_values(model: nn.Module, steps: int = 50, seed: int = 0) -> dict[str, float]:
    """The largest singular value of each matrix by its parameter's name, to set a wide model beside a narrow one.

    Kernels of convolutions are seen as (out, rest). By power iteration, from below.
    """
    values = {}
    for name, p in model.named_parameters():
        if p.dim() > 1:
            W = p.detach().flatten(1).to(torch.promote_types(p.dtype, torch.float32))
            v = torch.randn(W.shape[1], dtype=W.dtype, generator=torch.Generator().manual_seed(seed)).to(W.device)
            for _ in range(steps):
                v = torch.nn.functional.normalize(W.mT @ (W @ v), dim=0, eps=1e-30)
            values[name] = float(torch.linalg.vector_norm(W @ v))
    return values
