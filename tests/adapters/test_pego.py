"""What is particular to PEGO: a group of LoRAs, and a penalty that keeps them apart and apart from the weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import isotune
from support import move, penalty_of


def group(n_out: int = 6, n_in: int = 9, **options: Any) -> tuple[nn.Linear, Any]:
    torch.manual_seed(0)
    layer = nn.Linear(n_in, n_out).double()
    bare = nn.Linear(n_in, n_out).double()
    bare.load_state_dict(layer.state_dict())
    model = isotune.adapt(nn.Sequential(layer), isotune.method("pego", rank=2, count=3, **options), ["0"], seed=0)
    return bare, move(model, size=0.3)[0].isotune["default"]


@pytest.mark.parametrize("norm", ["entrywise", "frobenius"])
@pytest.mark.parametrize("mean", [False, True])
def test_the_penalty_is_that_of_the_dense_changes(norm: str, mean: bool) -> None:
    layer, adapter = group(norm=norm, mean=mean, penalty=0.5)
    D, W = adapter.B @ adapter.A, layer.weight
    pairs = [(W, D[i]) for i in range(3)] + [(D[i], D[j]) for i in range(3) for j in range(i + 1, 3)]
    products = [left @ right.mT for left, right in pairs]
    sizes = [p.abs().sum() if norm == "entrywise" else p.square().sum() for p in products]
    expected = 0.5 * sum(sizes) / (36 if mean else 1)
    torch.testing.assert_close(penalty_of(adapter, layer), expected)


def test_the_penalty_is_zero_where_rows_are_orthogonal_and_does_not_see_how_a_change_is_factored() -> None:
    layer, adapter = group(n_out=3, n_in=16)
    before = penalty_of(adapter, layer)
    R = torch.randn(3, 2, 2, dtype=torch.float64)
    with torch.no_grad():
        adapter.B.copy_(adapter.B @ R)
        adapter.A.copy_(torch.linalg.solve(R, adapter.A))
    torch.testing.assert_close(penalty_of(adapter, layer), before)
    Q = torch.linalg.qr(torch.cat([layer.weight.detach(), torch.randn(13, 16, dtype=torch.float64)]).mT)[0].mT
    with torch.no_grad():
        adapter.A.copy_(Q[3:9].view(3, 2, 16))
    assert penalty_of(adapter, layer) < 1e-12
    with torch.no_grad():
        adapter.A[0, 0] += 0.1 * Q[0]
    assert penalty_of(adapter, layer) > 1e-5


def test_a_group_is_one_lora_and_its_penalty_has_a_gradient_from_the_start() -> None:
    layer, adapter = group()
    B, A = adapter.change()
    torch.testing.assert_close(adapter.weight(layer.weight), layer.weight + B @ A)
    torch.testing.assert_close(B @ A, (adapter.B @ adapter.A).sum(0))
    assert B.shape == (6, 6)
    for norm in ("entrywise", "frobenius"):
        model = isotune.adapt(
            nn.Sequential(nn.Linear(5, 4)), isotune.method("pego", rank=1, count=2, norm=norm), ["0"], seed=0
        )
        isotune.penalty(model).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
