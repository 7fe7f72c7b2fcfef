"""How much differential privacy DP-SGD gives: Rényi accounting of the Gaussian mechanism on Poisson samples.

    ε_a = 1 / (a - 1) · log Σ_k C(a, k) (1 - q)^(a - k) q^k exp((k² - k) / 2σ²)   for one step, of order a = 2, 3, ...

Orders add over steps. Papers: Mironov, Talwar and Zhang, "Rényi Differential Privacy of the Sampled Gaussian
Mechanism", 2019, arXiv 1908.10530; the way back to (ε, δ) is that of Canonne, Kamath and Steinke, "The Discrete
Gaussian for Differential Privacy", NeurIPS 2020, arXiv 2004.00010. It is an upper bound, some per cent above the
numerical accountants'.
"""

from __future__ import annotations

import math

import torch

_ORDERS = (*range(2, 65), *range(72, 257, 8), 320, 384, 512, 768, 1024)


def epsilon(noise: float, rate: float, steps: int, delta: float) -> float:
    """The ε of so many steps of DP-SGD at that δ, for data sets that differ by one example more or less.

    Args:
        noise: Standard deviation of the noise on the sum of gradients, divided by the norm they are clipped to.
        rate: Probability with which each example takes part in a step, independently of all others.
        steps: Number of steps.
        delta: Allowed probability of failure; much less than one over the number of examples.
    """
    if steps == 0:
        return 0.0
    if noise == 0:
        return math.inf
    return max(min(_bound(a, steps * renyi(a, noise, rate), delta) for a in _ORDERS), 0.0)


def renyi(order: int, noise: float, rate: float) -> float:
    """The Rényi divergence of a whole order, 2 or more, of one step."""
    if rate == 1:
        return order / (2 * noise**2)
    k = torch.arange(order + 1, dtype=torch.float64)
    choose = math.lgamma(order + 1) - torch.lgamma(k + 1) - torch.lgamma(order - k + 1)
    terms = choose + (order - k) * math.log1p(-rate) + k * math.log(rate) + (k * k - k) / (2 * noise**2)
    return float(terms.logsumexp(0)) / (order - 1)


def _bound(order: int, divergence: float, delta: float) -> float:
    return divergence + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)
