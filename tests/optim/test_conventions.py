"""What every optimizer owes to torch's conventions, whatever it does to a matrix."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isotune.errors import OptionError
from isotune.linalg.cayley import skew, upper_of
from isotune.optim import OPTIMIZERS, Muon, NorMuon, ScionLight, optimizer_class

OPTIONS: dict[str, dict[str, Any]] = {
    "conda": {"update_proj_gap": 2},
    "dct_adamw": {"rank": 2, "error_feedback": True, "update_proj_gap": 2},
    "trion": {"rank": 2},
}
BATCHED = sorted(OPTIMIZERS.keys() - {"odelora"})
"""Those that step any parameter by itself; pairs have tests of their own."""
SHAPES = [(6, 4), (4, 6), (6, 4), (3, 2, 2, 2), (7,), (), (6, 4)]
EVERY = pytest.mark.parametrize("name", BATCHED)


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[nn.Parameter]:
    """Matrices, kernels, a vector and a number."""
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def gradients(count: int, dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    """For each of so many steps."""
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES] for _ in range(count)]


def made(name: str, params: Any, **options: Any) -> Any:
    """The optimizer."""
    return optimizer_class(name)(params, lr=0.1, **OPTIONS.get(name, {}), **options)


def run(optimizer: Any, params: list[nn.Parameter], steps: list[list[Tensor]]) -> list[Tensor]:
    """What the parameters are after these gradients. Scion Light's gather in them."""
    for found in steps:
        for p, g in zip(params, found, strict=True):
            gathers = isinstance(optimizer, ScionLight) and p.grad is not None
            p.grad = p.grad + g if gathers and p.grad is not None else g.clone()
        optimizer.step()
    return [p.detach().clone() for p in params]


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_state_of_tensors_alone_goes_on_to_the_bit(name: str, dtype: torch.dtype) -> None:
    steps = gradients(5, dtype)
    whole = parameters(dtype)
    expected = run(made(name, whole), whole, steps)
    first = parameters(dtype)
    before = made(name, first)
    run(before, first, steps[:3])
    file = io.BytesIO()
    torch.save(before.state_dict(), file)
    file.seek(0)
    second = [nn.Parameter(p.detach().clone()) for p in first]
    for p, q in zip(second, first, strict=True):
        p.grad = q.grad.clone()  # type: ignore[union-attr]
    after = made(name, second)
    after.load_state_dict(torch.load(file, weights_only=True))
    assert all(map(torch.equal, run(after, second, steps[3:]), expected))
    loaded = {id(t) for state in after.state.values() for t in state.values()}
    assert not loaded & {id(t) for state in before.state.values() for t in state.values()}


@pytest.mark.parametrize("name", [name for name in BATCHED if name != "scion_light"])  # copies have no gradients
def test_a_copy_goes_its_own_way(name: str) -> None:
    params, steps = parameters(), gradients(3)
    optimizer = made(name, params)
    run(optimizer, params, steps[:1])
    state = copy.deepcopy(optimizer.state_dict())
    copied = copy.deepcopy({"params": params, "optimizer": optimizer})
    run(copied["optimizer"], copied["params"], steps[1:])
    for number, entries in optimizer.state_dict()["state"].items():
        assert all(torch.equal(t, state["state"][number][key]) for key, t in entries.items())
    assert all(map(torch.equal, run(optimizer, params, steps[1:]), [p.detach() for p in copied["params"]]))


@EVERY
def test_together_is_one_by_one(name: str) -> None:
    together, steps = parameters(torch.float64), gradients(4, torch.float64)
    expected = run(made(name, together), together, steps)
    for i, p in enumerate(parameters(torch.float64)):
        alone = run(made(name, [p]), [p], [[step[i]] for step in steps])
        torch.testing.assert_close(alone[0], expected[i], rtol=1e-10, atol=1e-12)


@EVERY
def test_what_has_no_gradient_stays_and_what_misses_one_goes_on(name: str) -> None:
    params, steps = parameters(), gradients(4)
    optimizer = made(name, params, **({} if name.startswith("scion") else {"weight_decay": 0.1}))
    run(optimizer, params, steps[:2])
    kept = params[2].detach().clone()
    for p, g in zip(params, steps[2], strict=True):
        p.grad = g.clone()
    params[2].grad = None
    optimizer.step()
    assert torch.equal(params[2], kept)
    alone = parameters()[2]
    expected = run(made(name, [alone], **optimizer_decay(name)), [alone], [[steps[i][2]] for i in (0, 1, 3)])
    if name == "scion_light":
        return  # what gathered in the gradient is gone with it
    torch.testing.assert_close(run(optimizer, params, steps[3:])[2], expected[0], rtol=1e-5, atol=1e-6)


def optimizer_decay(name: str) -> dict[str, float]:
    """Scion shrinks by its own rule."""
    return {} if name.startswith("scion") else {"weight_decay": 0.1}


@EVERY
def test_closures_schedulers_and_gradients_are_torchs(name: str) -> None:
    params = parameters()
    optimizer = made(name, params)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in params)
        assert isinstance(loss, Tensor)
        loss.backward()
        return loss

    first = float(optimizer.step(closure).detach())
    before = [None if p.grad is None else p.grad.clone() for p in params]
    after = optimizer.step()  # without one: the gradients that are there
    assert after is None
    if name != "scion_light":
        assert all(torch.equal(p.grad, g) for p, g in zip(params, before, strict=True))  # type: ignore[arg-type]
    scheduler.step()
    kept = [p.detach().clone() for p in params]
    assert float(optimizer.step(closure).detach()) < first
    assert all(map(torch.equal, [p.detach() for p in params], kept))


@pytest.mark.parametrize("name", ["muon", "normuon", "auon", "conda", "dct_adamw", "trion", "allora"])
def test_vectors_and_groups_that_ask_for_it_are_stepped_by_torchs_adamw(name: str) -> None:
    params, steps = parameters(torch.float64), gradients(4, torch.float64)
    adamw = {"adamw_betas": (0.8, 0.9), "adamw_eps": 1e-3, "weight_decay": 0.2}
    groups = [
        {"params": params[:3], "algorithm": name},
        {"params": params[3:4], "algorithm": "adamw", **adamw},
        {"params": params[4:], "algorithm": "adamw", **adamw},
    ]
    found = run(made(name, groups), params, steps)
    others = parameters(torch.float64)[3:]
    theirs = torch.optim.AdamW(others, lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.2)
    expected = run(theirs, others, [step[3:] for step in steps])
    for ours, adamw in zip(found[3:], expected, strict=True):
        torch.testing.assert_close(ours, adamw, rtol=1e-12, atol=1e-14)


def test_kernels_are_seen_as_out_and_rest_and_parts_as_what_they_are() -> None:
    K = torch.randn(5, 2, 3, 3, dtype=torch.float64)
    Q = torch.randn(4, 6, dtype=torch.float64)  # four skew-symmetric matrices of 4 x 4
    batch = torch.randn(3, 5, 2, dtype=torch.float64)
    params = [nn.Parameter(t.clone()) for t in (K, Q, batch)]
    parts = ["matrix", "skew", "matrices"]
    groups = [{"params": [p], "part": part} for p, part in zip(params, parts, strict=True)]
    optimizer = Muon(groups, lr=0.1, weight_decay=0)
    flat = [nn.Parameter(t.clone()) for t in (K.flatten(1), *skew(Q, 4), *batch)]
    slow = Muon(flat, lr=0.1, weight_decay=0)
    for _ in range(3):
        found = [torch.randn_like(p) for p in params]
        for p, g in zip(params, found, strict=True):
            p.grad = g
        for p, g in zip(flat, (found[0].flatten(1), *skew(found[1], 4), *found[2]), strict=True):
            p.grad = g
        optimizer.step()
        slow.step()
    torch.testing.assert_close(params[0].detach().flatten(1), flat[0].detach())
    torch.testing.assert_close(params[1].detach(), upper_of(torch.stack(flat[1:5]).detach()))
    torch.testing.assert_close(params[2].detach(), torch.stack(flat[5:]).detach())


def test_groups_and_options_that_mean_nothing_are_refused() -> None:
    W, b = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="algorithm is 'lion'; here it is 'muon' or 'adamw'"):
        Muon([{"params": [W], "algorithm": "lion"}])
    with pytest.raises(ValueError, match=r"muon steps matrices; a parameter has the shape \(2,\)"):
        Muon([{"params": [b], "algorithm": "muon"}])
    with pytest.raises(ValueError, match="part is 'tree'; it is one of matrix, matrices, skew"):
        Muon([{"params": [W], "part": "tree"}])
    with pytest.raises(ValueError, match="adjust_lr_fn is 'big'"):
        NorMuon([W], adjust_lr_fn="big")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lr is -1"):
        Muon([W], lr=-1)
    with pytest.raises(OptionError, match=r"optimizer 'moun' is unknown\. Did you mean 'muon'"):
        optimizer_class("moun")
    W.grad = torch.zeros(2, 2).to_sparse()
    with pytest.raises(RuntimeError, match="no sparse gradients"):
        Muon([W]).step()
