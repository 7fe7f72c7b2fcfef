"""The balanced flow: what its velocities must be, its integrators' orders, and that balancing changes no product."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import isotune
from isotune.optim import ODELoRA, rebalanced
from isotune.optim.odelora import flow

m, n, r = 9, 7, 3


def balanced() -> tuple[Tensor, Tensor]:
    """A and B on the balanced manifold, turned so that nothing is diagonal."""
    A, B = rebalanced(torch.randn(r, n, dtype=torch.float64), torch.randn(m, r, dtype=torch.float64))
    R = torch.linalg.qr(torch.randn(r, r, dtype=torch.float64))[0]
    return R.mT @ A, B @ R


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_the_product_goes_down_the_gradient_as_far_as_its_rank_lets_it_and_stays_balanced(scale: float) -> None:
    A, B = balanced()
    G = torch.randn(m, n, dtype=torch.float64)
    (dA,), (dB,) = flow(A[None], B[None], (scale * B.mT @ G)[None], (scale * G @ A.mT)[None], scale)
    P_A, P_B = A.mT @ torch.linalg.inv(A @ A.mT) @ A, B @ torch.linalg.inv(B.mT @ B) @ B.mT
    torch.testing.assert_close(scale * (B @ dA + dB @ A), -(P_B @ G + G @ P_A - P_B @ G @ P_A))
    torch.testing.assert_close(B.mT @ dB + dB.mT @ B, dA @ A.mT + A @ dA.mT)


def trained(integrator: Any, step: float, count: int, turned: bool = False) -> tuple[Tensor, Tensor, float]:
    """A and B after so many steps towards a matrix, from one start, and the last loss."""
    torch.manual_seed(3)
    A, B = balanced()
    target = torch.randn(m, n, dtype=torch.float64)
    if turned:
        R = torch.linalg.qr(torch.randn(r, r, dtype=torch.float64))[0]
        A, B = R.mT @ A, B @ R
    a, b = nn.Parameter(A), nn.Parameter(B)
    optimizer = ODELoRA([a, b], lr=step, integrator=integrator, damping=0.0, rebalance_every=0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (b @ a - target).square().sum() / 2
        loss.backward()
        return loss

    loss = [float(optimizer.step(closure).detach()) for _ in range(count)][-1]
    return a.detach(), b.detach(), loss


def test_higher_orders_keep_the_balance_better_by_their_orders() -> None:
    def gap(integrator: str, step: float) -> float:
        A, B, _ = trained(integrator, step, round(1 / step))
        return float((B.mT @ B - A @ A.mT).norm())

    for integrator, order in (("euler", 1), ("heun", 2), ("rk4", 4)):
        coarse, fine = gap(integrator, 0.05), gap(integrator, 0.025)
        assert 2 ** (order - 0.5) < coarse / fine < 2 ** (order + 1.5)


def test_the_product_does_not_know_how_the_factors_are_turned() -> None:
    A, B, _ = trained("euler", 0.05, 20)
    C, D, _ = trained("euler", 0.05, 20, turned=True)
    torch.testing.assert_close(B @ A, D @ C)


def test_it_descends() -> None:
    assert trained("euler", 0.1, 50)[2] < trained("euler", 0.1, 1)[2] / 2


def test_balancing_leaves_the_product() -> None:
    A, B = torch.randn(2, r, n), torch.randn(2, m, r)
    a, b = rebalanced(A, B)
    torch.testing.assert_close(b @ a, B @ A, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(b.mT @ b, a @ a.mT, rtol=1e-4, atol=1e-5)
    a, b = rebalanced(A, 0 * B)  # nothing is known of which directions matter: A keeps what it has
    assert torch.equal(a, A)
    assert not b.any()


def test_small_factors_are_not_thrown_far() -> None:
    A, B = balanced()
    a, b = nn.Parameter(1e-4 * A), nn.Parameter(1e-4 * B)
    G = torch.randn(m, n, dtype=torch.float64)
    optimizer = ODELoRA([a, b], lr=0.1)
    sizes = []
    for _ in range(40):
        a.grad, b.grad = b.detach().mT @ G, G @ a.detach().mT
        optimizer.step()
        sizes.append(float((b @ a).detach().norm()))
    assert sizes[0] < 1e-6
    assert sizes == sorted(sizes)
    assert sizes[-1] == pytest.approx(0.1 * 40 * float(torch.linalg.svdvals(G)[:r].norm()), rel=0.5)


def test_a_lora_from_zero_trains_and_the_head_beside_it_by_adamw() -> None:
    X = torch.randn(64, 6)
    y = (X @ torch.randn(6, 3)).argmax(dim=1)
    model = isotune.adapt(
        nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)),
        isotune.method("lora", rank=2, alpha=6.0),
        ["0"],
        train_also=["2"],
        seed=0,
    )
    groups = isotune.parameter_groups(model, lr=0.05, algorithm="odelora")
    assert {group.get("scale") for group in groups if group["algorithm"] == "odelora"} == {3.0}
    for integrator in ("euler", "heun"):
        optimizer = ODELoRA(groups, integrator=integrator)  # type: ignore[arg-type]

        def closure() -> Tensor:
            optimizer.zero_grad()  # noqa: B023
            loss = nn.functional.cross_entropy(model(X), y)
            loss.backward()
            return loss

        losses = [float(optimizer.step(closure).detach()) for _ in range(40)]
        assert losses[-1] < 0.9 * losses[0]
        head = {id(p) for p in model[2].parameters()}
        assert all(float(optimizer.state[p]["step"]) == 40 for p in optimizer.state if id(p) in head)


def test_what_is_no_pair_is_refused() -> None:
    A, B = nn.Parameter(torch.zeros(2, 5)), nn.Parameter(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="pairs A"):
        ODELoRA([B, A])
    with pytest.raises(ValueError, match="pairs A"):
        ODELoRA([A])
    with pytest.raises(ValueError, match="rk4 computes 4 gradients a step and needs a closure"):
        ODELoRA([A, B], integrator="rk4").step()
    with pytest.raises(ValueError, match="one of euler, heun, rk4"):
        ODELoRA([A, B], integrator="leapfrog")  # type: ignore[arg-type]
