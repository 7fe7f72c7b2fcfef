"""AI-SARAH and APTS, which find their steps, and NOG and OLR, which are put on other optimizers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isotune.optim import AISARAH, APTS, Muon, OptimalRates, nearest_orthogonal_gradients
from isotune.optim.nog import optimal_rate


def quadratic(d: int = 6) -> tuple[nn.Parameter, Tensor, Callable[[], Tensor]]:
    """A start, a Hessian, and `w H w / 2`."""
    Q = torch.randn(d, d, dtype=torch.float64)
    H = Q @ Q.mT + torch.eye(d, dtype=torch.float64)
    w = nn.Parameter(torch.randn(d, dtype=torch.float64))
    return w, H, lambda: w @ H @ w / 2


@pytest.mark.parametrize("gauss_newton", [False, True])
def test_ai_sarahs_step_on_a_quadratic_is_the_best_along_its_way(gauss_newton: bool) -> None:
    w, H, f = quadratic()
    before = w.detach().clone()
    optimizer = AISARAH([w], gauss_newton=gauss_newton)
    v = H @ before
    optimizer.step(f, f)
    alpha = v @ H @ v / (H @ v).square().sum()
    torch.testing.assert_close(w.detach(), before - alpha * v)
    assert optimizer.param_groups[0]["step_size"] == pytest.approx(float(alpha))
    torch.testing.assert_close(optimizer.state[w]["v"], H @ w.detach())  # with all rows v is the whole gradient


def test_ai_sarahs_third_derivative_is_in_its_step() -> None:
    w = nn.Parameter(torch.tensor([0.7], dtype=torch.float64))
    optimizer = AISARAH([w])
    x = 0.7
    optimizer.step(lambda: w.pow(4).sum(), lambda: w.pow(4).sum())
    v, h, third = 4 * x**3, 12 * x**2, 24 * x
    alpha = (v * h * v) / abs((h * v) ** 2 + v * third * v * v)
    assert float(w.detach()) == pytest.approx(x - alpha * v)


def test_ai_sarah_descends_a_logistic_regression_without_a_rate_and_goes_on_from_its_state() -> None:
    X = torch.randn(80, 5, dtype=torch.float64)
    y = (X @ torch.randn(5, dtype=torch.float64) > 0).double()
    w = nn.Parameter(torch.zeros(5, dtype=torch.float64))

    def loss(rows: Any) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(X[rows] @ w, y[rows]) + 0.005 * w.square().sum()

    optimizer = AISARAH([w])
    batches = torch.arange(80).view(10, 8)
    everything = torch.arange(80)
    for step in range(60):
        if step == 30:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = AISARAH([w])
            optimizer.load_state_dict(state)
        optimizer.step(lambda: loss(batches[step % 10]), lambda: loss(everything))  # noqa: B023
    whole = loss(everything)
    (gradient,) = torch.autograd.grad(whole, [w])
    assert float(gradient.norm()) < 1e-2


def test_ai_sarah_draws_the_same_in_a_step_and_stays_where_there_is_no_curvature() -> None:
    w = nn.Parameter(torch.ones(4, dtype=torch.float64))
    dropout = nn.Dropout(0.5)
    optimizer = AISARAH([w])
    optimizer.step(lambda: dropout(w).square().sum(), lambda: w.square().sum())
    assert bool(w.isfinite().all())
    flat = nn.Parameter(torch.ones(4))
    AISARAH([flat]).step(lambda: flat.sum(), lambda: flat.sum())
    assert torch.equal(flat.detach(), torch.ones(4))


def shards(workers: int, seed: int = 0) -> tuple[nn.Module, list[Callable[[], Tensor]]]:
    """A small network and a loss for each worker's rows."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    X, y = torch.randn(60, 4, dtype=torch.float64), torch.randn(60, 1, dtype=torch.float64)
    parts = [(X[i::workers], y[i::workers]) for i in range(workers)]
    return model, [lambda part=part: nn.functional.mse_loss(model(part[0]), part[1]) for part in parts]  # type: ignore[misc]


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_apts_never_rises_and_stays_in_its_region(workers: int) -> None:
    model, losses = shards(workers)
    optimizer = APTS(model.parameters(), global_steps=0)
    before = float(sum(loss() for loss in losses).detach()) / workers  # type: ignore[union-attr]
    start, values = before, []
    for _ in range(25):
        w = nn.utils.parameters_to_vector(model.parameters()).detach()
        radius = optimizer.param_groups[0]["radius"]
        values.append(optimizer.step(losses))
        moved = nn.utils.parameters_to_vector(model.parameters()).detach() - w
        assert float(moved.norm()) <= radius * (1 + 1e-9)
        assert 1e-4 <= optimizer.param_groups[0]["radius"] <= 2.0
        assert values[-1] <= before + 1e-12
        before = values[-1]
        assert before == pytest.approx(float(sum(loss() for loss in losses).detach()) / workers)  # type: ignore[union-attr]
    assert before < 0.95 * start


def test_apts_of_one_worker_and_one_step_is_a_trust_region() -> None:
    model, losses = shards(1)
    w = nn.utils.parameters_to_vector(model.parameters()).detach()
    g = nn.utils.parameters_to_vector(torch.autograd.grad(losses[0](), list(model.parameters())))
    APTS(model.parameters(), radius=1e-2, local_steps=1, global_steps=0).step(losses)
    moved = nn.utils.parameters_to_vector(model.parameters()).detach() - w
    torch.testing.assert_close(moved, -1e-2 * g / g.norm())


def test_every_worker_of_apts_begins_along_the_whole_gradient() -> None:
    # Without the correction, workers with opposed rows would each follow their own.
    w = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    wanted = [torch.tensor([1.0, 10.0]).double(), torch.tensor([1.0, -10.0]).double()]
    losses = [lambda target=target: (w - target).square().sum() for target in wanted]
    APTS([w], radius=0.2, local_steps=1, global_steps=0).step(losses)
    torch.testing.assert_close(w.detach(), torch.tensor([0.2, 0.0], dtype=torch.float64))


def test_apts_refuses_bounds_that_are_none() -> None:
    with pytest.raises(ValueError, match="min_radius <= radius <= max_radius"):
        APTS([nn.Parameter(torch.zeros(2))], radius=5.0)


def test_nog_gives_the_optimizer_orthogonal_gradients_and_keeps_ours() -> None:
    W, K = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(4, 2, 3, 3))
    start = [p.detach().clone() for p in (W, K)]
    optimizer = torch.optim.SGD([W, K], lr=1.0)
    handle = nearest_orthogonal_gradients(optimizer, [W, K])
    own = [torch.randn_like(p) for p in (W, K)]
    W.grad, K.grad = own
    kept = [g.clone() for g in own]
    optimizer.step()
    for p, before in zip((W, K), start, strict=True):
        values = torch.linalg.svdvals((before - p.detach()).flatten(1))
        torch.testing.assert_close(values, torch.ones_like(values))
    assert all(map(torch.equal, own, kept))
    handle.remove()
    before = W.detach().clone()
    W.grad = kept[0]
    optimizer.step()
    torch.testing.assert_close(W.detach(), before - kept[0])
    for scale in ("original", "norm"):
        p = nn.Parameter(torch.zeros(6, 3))
        nearest_orthogonal_gradients(sgd := torch.optim.SGD([p], lr=1.0), [p], scale=scale)
        p.grad = torch.randn(6, 3)
        length = float(p.grad.norm()) if scale == "norm" else 6**0.5
        sgd.step()
        assert float(p.detach().norm()) == pytest.approx(length, rel=1e-5)


def test_olr_is_its_formula_within_its_bounds() -> None:
    w, g = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    g = g * torch.sign((w * g).sum())
    ww, wg, gg = (w * w).sum(), (w * g).sum(), (g * g).sum()
    assert optimal_rate([w], [g]) == pytest.approx(float(ww * wg / (ww * gg + 2 * wg**2)))
    assert optimal_rate([w], [3 * g]) == pytest.approx(optimal_rate([w], [g]) / 3)
    assert optimal_rate([w], [g]) <= float(w.norm() / (8**0.5 * g.norm())) + 1e-12
    assert optimal_rate([w[:2], w[2:]], [g[:2], g[2:]]) == pytest.approx(optimal_rate([w], [g]))
    assert optimal_rate([w], [0 * g]) == 0.0


@pytest.mark.parametrize("sign", [1, -1])
def test_olr_is_used_where_it_is_smaller_and_the_own_rate_comes_back(sign: int) -> None:
    p = nn.Parameter(torch.randn(5, 3, dtype=torch.float64))
    start = p.detach().clone()
    optimizer = torch.optim.SGD([p], lr=10.0)
    rates = OptimalRates(optimizer, optimizer.param_groups)
    g = torch.randn(5, 3, dtype=torch.float64)
    p.grad = sign * g * torch.sign((start * g).sum())
    optimizer.step()
    used = float((start - p.detach()).norm() / p.grad.norm())
    assert used == pytest.approx(optimal_rate([start], [p.grad]) if sign == 1 else 10.0)
    assert optimizer.param_groups[0]["lr"] == 10.0
    rates.remove()
    before = p.detach().clone()
    optimizer.step()
    torch.testing.assert_close(p.detach(), before - 10 * p.grad)


def test_nog_then_muon_is_muon() -> None:
    W, G = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    found = []
    for put in (True, False):
        p = nn.Parameter(W.clone())
        optimizer = Muon([p], lr=0.1, method="svd")
        if put:
            nearest_orthogonal_gradients(optimizer, [p])
        p.grad = G
        optimizer.step()
        found.append(p.detach())
    torch.testing.assert_close(*found)
