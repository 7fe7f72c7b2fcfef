"""NOG and OLR: the orthogonal gradient nearest to a weight's, and the rate that keeps the weight near to orthogonal.

    NOG:  G ← U Vᵀ for G = U S Vᵀ, then whatever optimizer there is
    OLR:  lr* = |w|² <l, w> / (|w|² |l|² + 2 <l, w>²)  for w = vec(W), l = vec(G), where 0 < lr* < lr, else lr

Both are put on an optimizer for chosen weights, such as the one before a layer that decomposes or whitens its input,
and take place at each of its steps: gradients are whole by then (accumulated, reduced, unscaled). Where both are
wanted, NOG is put on first.

Papers: "Improving Covariance Conditioning of the SVD Meta-layer by Orthogonality", ECCV 2022, arXiv 2207.02119;
"Orthogonal SVD Covariance Conditioning and Latent Disentanglement", TPAMI 2022, arXiv 2212.05599.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from isotune.optim.matrix import adjustment
from isotune.optim.orthogonalize import Method, orthogonalize


def nearest_orthogonal_gradients(
    optimizer: Optimizer,
    params: Iterable[Tensor],
    method: Method = "svd",
    scale: Literal["original", "norm"] | None = None,
) -> RemovableHandle:
    """Let the optimizer's steps see orthogonal gradients of these weights; the gradients are replaced, not changed.

    Args:
        optimizer: Any.
        params: Weights with two dimensions or more; those after the first are one.
        method: "svd", exact (zero where a gradient has no rank), or as for `orthogonalize`.
        scale: None for singular values of 1, "original" for Muon's factor, "norm" to keep the gradient's length.

    Returns:
        A handle whose `remove` ends it.
    """
    weights = list(params)

    def before(*_: Any) -> None:
        for p in weights:
            if p.grad is not None:
                p.grad = _orthogonal(p.grad, method, scale)

    return optimizer.register_step_pre_hook(before)


def _orthogonal(gradient: Tensor, method: Method, scale: str | None) -> Tensor:
    G = gradient.flatten(1)
    Q = orthogonalize(G, method)
    if scale == "norm":
        Q = Q * (torch.linalg.vector_norm(G) / torch.linalg.vector_norm(Q).clamp_min(torch.finfo(Q.dtype).tiny))
    elif scale == "original":
        Q = Q * adjustment(G.shape, "original")
    return Q.view_as(gradient)


class OptimalRates:
    """Gives chosen groups of an optimizer OLR's learning rate at each step, and their own back after it.

    Args:
        optimizer: Any whose groups have an `lr`.
        groups: Of its `param_groups` those meant; of a group with several weights they are one vector.
    """

    def __init__(self, optimizer: Optimizer, groups: Iterable[dict[str, Any]]) -> None:
        self.groups = list(groups)
        self._own: list[Any] = []
        self._handles = [
            optimizer.register_step_pre_hook(self._set),
            optimizer.register_step_post_hook(self._restore),
        ]

    def remove(self) -> None:
        """Leave the rates alone again."""
        for handle in self._handles:
            handle.remove()

    def _set(self, *_: Any) -> None:
        self._own = [group["lr"] for group in self.groups]
        for group in self.groups:
            pairs = [(p, p.grad) for p in group["params"] if p.grad is not None]
            best = optimal_rate([p for p, _ in pairs], [g for _, g in pairs])
            if 0 < best < float(group["lr"]):
                group["lr"] = best

    def _restore(self, *_: Any) -> None:
        for group, own in zip(self.groups, self._own, strict=True):
            group["lr"] = own


@torch.no_grad()
def optimal_rate(weights: list[Tensor], gradients: list[Tensor]) -> float:
    """lr* of weights and their gradients, of the same shapes; 0 where all gradients, or all weights, are zero."""
    dots = torch.zeros(3, dtype=torch.float64)
    for w, g in zip(weights, gradients, strict=True):
        w, g = w.double(), g.double()
        dots += torch.stack([(w * w).sum(), (w * g).sum(), (g * g).sum()]).cpu()
    ww, wg, gg = dots.tolist()
    below = ww * gg + 2 * wg * wg
    return ww * wg / below if below > 0 else 0.0
