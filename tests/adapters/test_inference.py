"""Where nothing learns a layer runs by constants, as long as what they were made of is what is there."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import isotune

METHODS = {
    "lora": {"rank": 2, "alpha": 6.0},
    "hra": {"rank": 4, "start": "random"},
    "hoft": {"rank": 4},
    "dora": {"rank": 2},
    "doran": {"rank": 2},
    "pissa": {"rank": 2},
    "miss": {"rank": 4},
    "vera": {"rank": 4},
}
CONSTANT = [*METHODS, "hra on the output side"]


def adapted(name: str = "hra", layer: nn.Module | None = None, adapter: str = "default") -> nn.Module:
    options = {"side": "out", "rank": 4, "start": "random"} if " " in name else METHODS[name]
    model = nn.Sequential(nn.Linear(16, 8) if layer is None else layer)
    return disturbed(isotune.adapt(model, isotune.method(name.split()[0], **options), ["0"], seed=0, name=adapter))


def disturbed(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model.double().eval()


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def kept(model: nn.Module) -> object:
    return model[0].isotune.inference


def check(model: nn.Module, x: Tensor) -> Tensor:
    """What the model gives without a graph, which is what it gives with one."""
    expected = model(x).detach()
    with torch.no_grad():
        y = model(x)
    torch.testing.assert_close(y, expected)
    return y


class Launches(TorchDispatchMode):
    """Counts the operations that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = function(*args, **(kwargs or {}))
        views = {a.untyped_storage()._cdata for a in args if isinstance(a, Tensor)}
        writes = function._schema.is_mutable or not isinstance(out, Tensor)
        if writes or out.untyped_storage()._cdata not in views:
            self.names.append(function._schema.name)
        return out


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CONSTANT)
def test_a_layer_gives_what_it_gives_in_training(name: str, bias: bool) -> None:
    model = adapted(name, nn.Linear(16, 8, bias=bias))
    for x in (rows(5), rows(2, 3), rows(0), torch.zeros(16, dtype=torch.float64)):
        check(model, x)
        assert kept(model) is not None


@pytest.mark.parametrize("name", CONSTANT)
def test_two_products_are_added_to_the_layers_own(name: str) -> None:
    model, x = adapted(name, nn.Linear(16, 8, bias=False)), rows(1)
    with torch.no_grad():
        model(x)
        with Launches() as launched:
            model(x)
    scaled = name.startswith("dora")
    assert len(launched.names) == 3 + scaled, launched.names


def test_convolutions_have_constants_and_indices_do_not() -> None:
    conv = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1))
    isotune.adapt(conv, isotune.HRA(rank=4, start="random"), ["0"], seed=0)
    check(disturbed(conv), torch.randn(2, 3, 6, 6, dtype=torch.float64))
    assert kept(conv) is not None
    table = disturbed(isotune.adapt(nn.Sequential(nn.Embedding(7, 16)), isotune.LoRA(rank=2), ["0"], seed=0))
    check(table, torch.tensor([[1, 2], [3, 6]]))
    assert kept(table) is None


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "a step in place": lambda model: model[0].isotune["default"].U.add_(torch.rand(16, 4)),
    "another tensor": lambda model: setattr(
        model[0].isotune["default"], "U", nn.Parameter(torch.randn(16, 4, dtype=torch.float64))
    ),
    "another weight": lambda model: setattr(
        model[0], "weight", nn.Parameter(torch.randn(8, 16, dtype=torch.float64), requires_grad=False)
    ),
    "other numbers by .data": lambda model: setattr(
        model[0].isotune["default"].U, "data", torch.randn(16, 4, dtype=torch.float64)
    ),
    "a weight by .data": lambda model: setattr(
        model[0]._parameters["weight"], "data", torch.randn(8, 16, dtype=torch.float64)
    ),
    "a step on the weight": lambda model: model[0]._parameters["weight"].detach().mul_(2.0),
    "loaded state": lambda model: model.load_state_dict({k: 2 * v for k, v in model.state_dict().items()}),
    "loaded by assignment": lambda model: model.load_state_dict(
        {k: -v for k, v in model.state_dict().items()}, assign=True
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_constants_are_made_anew_when_something_changes(what: str) -> None:
    model, x = adapted(), rows(5)
    before = check(model, x)
    with torch.no_grad():
        CHANGES[what](model)
    assert not torch.allclose(check(model, x), before)


def test_constants_follow_switching_folding_and_disabling() -> None:
    model, x = adapted(), rows(5)
    one = check(model, x)
    isotune.adapt(model, isotune.LoRA(rank=2), ["0"], seed=3, name="other")
    disturbed(model)
    other = check(model, x)
    assert not torch.allclose(one, other)
    torch.testing.assert_close(check(isotune.use(model, "default"), x), one)
    check(isotune.use(model, "default", "other"), x)
    isotune.use(model, "default")
    isotune.fold(model)
    torch.testing.assert_close(check(model, x), one)
    isotune.unfold(model)
    torch.testing.assert_close(check(model, x), one)
    with isotune.disabled(model):
        assert not torch.allclose(check(model, x), one)
    torch.testing.assert_close(check(model, x), one)
    check(isotune.use(model), x)


def test_constants_follow_the_dtype() -> None:
    model, x = adapted(), rows(5)
    wide = check(model, x)
    model.float()
    with torch.no_grad():
        torch.testing.assert_close(model(x.float()).double(), wide, rtol=1e-4, atol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x.float()).dtype == torch.bfloat16


def test_constants_are_dropped_when_training_starts_and_stay_out_of_copies() -> None:
    model, x = adapted(), rows(5)
    check(model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert kept(other) is None
        check(other, x)
    model.train()
    assert kept(model) is None
    with torch.no_grad():
        model(x)
    assert kept(model) is None


def test_what_inference_mode_made_does_not_get_in_the_way_of_training() -> None:
    for name in METHODS:
        model, x = adapted(name), rows(5)
        with torch.inference_mode():
            expected = model(x).clone()
        y = model(x)
        torch.testing.assert_close(y, expected)
        y.square().sum().backward()
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("name", ["lora", "hra", "pissa"])
def test_rows_with_adapters_of_their_own_share_one_pass(name: str) -> None:
    model = adapted(name, adapter="a")
    isotune.adapt(model, isotune.method(name, **METHODS[name]), ["0"], seed=5, name="b")
    disturbed(model)
    alone = {}
    x = rows(4, 2)
    for which in ("a", "b", None):
        isotune.use(model, *([which] if which else []))
        alone[which] = check(model, x)
    wanted = ["b", None, "a", "b"]
    isotune.use(model, rows=wanted)
    with torch.no_grad():
        y = model(x)
        for row, which in enumerate(wanted):
            torch.testing.assert_close(y[row], alone[which][row])
        assert kept(model).mask.shape == (4, kept(model).L.shape[1])
        with Launches() as launched:
            model(x)
        assert len(launched.names) == 4, launched.names
        # Two beams a row, and many tokens a row, go the other way.
        beams = model(x.repeat_interleave(2, 0))
        torch.testing.assert_close(beams[::2], y)
        long = rows(4, 3000)
        torch.testing.assert_close(model(long), model.requires_grad_(True)(long).detach())


def test_large_constants_are_not_kept() -> None:
    model = nn.Sequential(nn.Linear(128, 96))
    isotune.adapt(model, isotune.method("vera", rank=80), ["0"], seed=0)
    x = torch.randn(3, 128, dtype=torch.float64)
    check(disturbed(model), x)
    assert kept(model) is None
    assert model[0].isotune.refused
    check(model.train().eval(), x)


def test_weights_of_a_route_may_change_in_place() -> None:
    model = adapted("lora", adapter="a")
    isotune.adapt(model, isotune.method("lora", **METHODS["lora"]), ["0"], seed=5, name="b")
    x, weights = rows(3, 2), torch.rand(3, 2, dtype=torch.float64)
    isotune.route(disturbed(model), weights, "a", "b")
    before = check(model, x)
    model[0].isotune.routing.weights.mul_(2)
    assert not torch.allclose(check(model, x), before)
