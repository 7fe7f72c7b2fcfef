"""Optimizers as their papers write them: one matrix, one step at a time, in float64, with nothing shared but this.

Each takes gradients for a matrix W (m, n) one after another, and gives W after each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def newton_schulz(G: Tensor, steps: int = 5) -> Tensor:
    """Five products in the open, on the shorter side."""
    if not G.any():
        return G
    X = (G.T if G.shape[0] > G.shape[1] else G) / G.norm()
    for _ in range(steps):
        A = X @ X.T
        X = 3.4445 * X - 4.7750 * (A @ X) + 2.0315 * (A @ A @ X)
    return X.T if G.shape[0] > G.shape[1] else X


def muon(W: Tensor, gradients: Sequence[Tensor], lr: float, wd: float, mu: float = 0.95) -> Iterator[Tensor]:
    """With Nesterov's look ahead, and the factor √max(1, m / n)."""
    M = torch.zeros_like(W)
    for G in gradients:
        M = mu * M + (1 - mu) * G
        step = newton_schulz(mu * M + (1 - mu) * G)
        W = W - lr * wd * W - lr * math.sqrt(max(1, W.shape[0] / W.shape[1])) * step
        yield W


def normuon(W: Tensor, gradients: Sequence[Tensor], lr: float, beta2: float = 0.95) -> Iterator[Tensor]:
    """Rows over the roots of their running mean squares, at Muon's length."""
    M, v = torch.zeros_like(W), torch.zeros(len(W), dtype=W.dtype)
    for G in gradients:
        M = 0.95 * M + 0.05 * G
        step = newton_schulz(0.95 * M + 0.05 * G)
        v = beta2 * v + (1 - beta2) * torch.stack([(row @ row) / len(row) for row in step])
        rows = torch.stack([row / v_i.sqrt() for row, v_i in zip(step, v, strict=True)])
        W = W - lr * math.sqrt(max(1, W.shape[0] / W.shape[1])) * rows * (step.norm() / rows.norm())
        yield W


def auon(W: Tensor, gradients: Sequence[Tensor], lr: float, gamma: float, steps: int) -> Iterator[Tensor]:
    """The paper's with no steps, and the hybrid."""
    M = torch.zeros_like(W)
    for G in gradients:
        M = 0.95 * M + 0.05 * G
        B = 0.95 * M + 0.05 * G
        B = newton_schulz(B, steps) if steps else B / B.norm()
        X = B / B.norm()
        W = W - lr * B / torch.sqrt((torch.cosh(gamma * X) ** 2).mean())
        yield W


def conda(W: Tensor, gradients: Sequence[Tensor], lr: float, every: int, scale: float = 0.25) -> Iterator[Tensor]:
    """Adam in the momentum's singular vectors of the shorter side."""
    M, v = torch.zeros_like(W), torch.zeros_like(W)
    high = W.shape[0] >= W.shape[1]
    for t, G in enumerate(gradients):
        M = 0.9 * M + 0.1 * G
        if t % every == 0:
            U, _, Vh = torch.linalg.svd(M, full_matrices=False)
            Q = Vh.T if high else U
        turn: Callable[[Tensor], Tensor] = (lambda X: X @ Q) if high else (lambda X: Q.T @ X)  # noqa: B023
        v = 0.99 * v + 0.01 * turn(G) ** 2
        step = turn(M) / (v.sqrt() + 1e-8) * math.sqrt(1 - 0.99 ** (t + 1)) / (1 - 0.9 ** (t + 1))
        W = W - lr * scale * (step @ Q.T if high else Q @ step)
        yield W


def cosines(d: int) -> Tensor:
    """The orthonormal DCT-II as a matrix, a cosine in each row."""
    rows = [[math.cos(math.pi * (2 * j + 1) * k / (2 * d)) for j in range(d)] for k in range(d)]
    C = torch.tensor(rows, dtype=torch.float64) * math.sqrt(2 / d)
    C[0] /= math.sqrt(2)
    return C


def largest(S: Tensor, rank: int) -> list[int]:
    """The columns with the largest sums of absolute values, in order."""
    scores = [(float(column.abs().sum()), i) for i, column in enumerate(S.T)]
    return sorted(i for _, i in sorted(scores, reverse=True)[:rank])


def trion(W: Tensor, gradients: Sequence[Tensor], lr: float, rank: int) -> Iterator[Tensor]:
    """On the transposed matrix where it is wide."""
    wide = W.shape[0] < W.shape[1]
    C, M = cosines(min(W.shape)), torch.zeros_like(W.T if wide else W)
    for G in gradients:
        M = M + (G.T if wide else G)
        rows = C[largest(M @ C.T, rank)]
        g = M @ rows.T
        M = M - 0.05 * g @ rows
        step = newton_schulz(g) @ rows
        W = W - lr * math.sqrt(max(1, W.shape[0] / W.shape[1])) * (step.T if wide else step)
        yield W


def dct_adamw(W: Tensor, gradients: Sequence[Tensor], lr: float, rank: int, feedback: bool) -> Iterator[Tensor]:
    """Moments of all cosines are kept here, and those that are not chosen forgotten."""
    wide = W.shape[0] < W.shape[1]
    C = cosines(min(W.shape))
    m, v, E = (torch.zeros_like(W.T if wide else W) for _ in range(3))
    for t, G in enumerate(gradients, start=1):
        A = (G.T if wide else G) + (E if feedback else 0)
        S = A @ C.T
        chosen = torch.zeros(len(C), dtype=W.dtype)
        chosen[largest(S, rank)] = 1
        E = A - (S * chosen) @ C
        m, v = (0.9 * m + 0.1 * S) * chosen, (0.999 * v + 0.001 * S**2) * chosen
        step = (m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)) @ C
        W = W - lr * 0.01 * W - lr * (step.T if wide else step)
        yield W


def scion(W: Tensor, gradients: Sequence[Tensor], lr: float, scale: float, constrained: bool) -> Iterator[Tensor]:
    """The spectral norm's."""
    d = torch.zeros_like(W)
    for G in gradients:
        d = 0.9 * d + 0.1 * G
        u = math.sqrt(W.shape[0] / W.shape[1]) * newton_schulz(d)
        W = (1 - lr if constrained else 1) * W - lr * scale * u
        yield W


def adarem(W: Tensor, gradients: Sequence[Tensor], lr: float, decay: float, wd: float) -> Iterator[Tensor]:
    """Entry by entry."""
    M = torch.zeros_like(W)
    for t, G in enumerate(gradients, start=1):
        b = torch.sign(G) * M / M.abs().max() if M.any() else torch.zeros_like(M)
        W = W - lr * ((1 + decay**t * b) * G + wd * W)
        M = 0.9 * M + 0.1 * G
        yield W


def allora(W: Tensor, gradients: Sequence[Tensor], lr: float, eta: float, late: bool) -> Iterator[Tensor]:
    """Row by row."""
    m, v = torch.zeros_like(W), torch.zeros_like(W)
    for t, G in enumerate(gradients, start=1):
        c = torch.stack([1 / torch.sqrt(row.norm() + 1 / eta**2) for row in W])[:, None]
        g = G if late else c * G
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        step = m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        W = W - lr * (c * step if late else step)
        yield W


def followed(make: Callable[[list[Any]], Any], W: Tensor, gradients: Sequence[Tensor]) -> list[Tensor]:
    """W after each step of the optimizer that `make` makes, on these gradients."""
    p = torch.nn.Parameter(W.clone())
    optimizer, found = make([p]), []
    for G in gradients:
        p.grad = G.clone()
        optimizer.step()
        assert torch.equal(p.grad, G)  # an optimizer leaves the gradient alone
        found.append(p.detach().clone())
    return found
