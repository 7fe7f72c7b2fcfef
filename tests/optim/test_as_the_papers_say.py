"""Each optimizer against its paper's equations, written slowly, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import slow
import torch
from slow import followed
from torch import Tensor

from isotune.optim import AdaRem, ALLoRA, AuON, Conda, DCTAdamW, HybridAuON, Muon, NorMuon, Scion, Trion

Reference = Callable[[Tensor, list[Tensor]], Iterator[Tensor]]
PAIRS: dict[str, tuple[Callable[[Any], Any], Reference]] = {
    "muon": (lambda p: Muon(p, lr=0.1, weight_decay=0.2), lambda W, G: slow.muon(W, G, 0.1, 0.2)),
    "normuon": (lambda p: NorMuon(p, lr=0.1), lambda W, G: slow.normuon(W, G, 0.1)),
    "normuon, beta2 0.5": (lambda p: NorMuon(p, lr=0.1, beta2=0.5), lambda W, G: slow.normuon(W, G, 0.1, 0.5)),
    "auon": (lambda p: AuON(p, lr=0.1), lambda W, G: slow.auon(W, G, 0.1, 1.5, 0)),
    "hybrid": (lambda p: HybridAuON(p, lr=0.1, gamma=1.0), lambda W, G: slow.auon(W, G, 0.1, 1.0, 1)),
    "conda": (lambda p: Conda(p, lr=0.1, update_proj_gap=3), lambda W, G: slow.conda(W, G, 0.1, 3)),
    "trion": (lambda p: Trion(p, lr=0.1, rank=3), lambda W, G: slow.trion(W, G, 0.1, 3)),
    "dct_adamw": (lambda p: DCTAdamW(p, lr=0.1, rank=3), lambda W, G: slow.dct_adamw(W, G, 0.1, 3, False)),
    "dct_adamw, error feedback": (
        lambda p: DCTAdamW(p, lr=0.1, rank=3, error_feedback=True),
        lambda W, G: slow.dct_adamw(W, G, 0.1, 3, True),
    ),
    "scion": (lambda p: Scion(p, lr=0.1, scale=2.0), lambda W, G: slow.scion(W, G, 0.1, 2.0, True)),
    "scion, free": (lambda p: Scion(p, lr=0.1, unconstrained=True), lambda W, G: slow.scion(W, G, 0.1, 1.0, False)),
    "adarem": (
        lambda p: AdaRem(p, lr=0.1, decay=0.9, weight_decay=0.2),
        lambda W, G: slow.adarem(W, G, 0.1, 0.9, 0.2),
    ),
    "allora": (lambda p: ALLoRA(p, lr=0.1, eta=3.0), lambda W, G: slow.allora(W, G, 0.1, 3.0, True)),
    "allora, gradients": (lambda p: ALLoRA(p, lr=0.1, mode="grad"), lambda W, G: slow.allora(W, G, 0.1, 2.0, False)),
}


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (6, 6)], ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_it_goes_the_way_of_the_papers_equations(name: str, shape: tuple[int, int]) -> None:
    make, reference = PAIRS[name]
    W = torch.randn(shape, dtype=torch.float64)
    gradients = [torch.randn(shape, dtype=torch.float64) for _ in range(7)]
    found = followed(make, W, gradients)
    for ours, theirs in zip(found, reference(W, gradients), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


def test_the_slow_twin_of_another_rule_is_told_apart() -> None:
    W, gradients = torch.randn(9, 4, dtype=torch.float64), [torch.randn(9, 4, dtype=torch.float64) for _ in range(3)]
    found = followed(lambda p: NorMuon(p, lr=0.1), W, gradients)
    assert not torch.allclose(found[-1], list(slow.muon(W, gradients, 0.1, 0.0))[-1], rtol=1e-3)
