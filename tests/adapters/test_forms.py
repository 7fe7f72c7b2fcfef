"""A rotation gives the same layer in every form, and inference keeps constants only as long as they hold."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import isotune
from isotune.adapters import thin_rotation


def adapted(layer: nn.Module, **options: object) -> nn.Module:
    model = isotune.adapt(nn.Sequential(layer), isotune.HRA(rank=4, start="random", **options), ["0"], seed=0)
    return model.double()


def outputs(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    y = model(x)
    return (y, *torch.autograd.grad(y.square().sum(), [x, model[0].isotune["default"].U]))


@pytest.mark.parametrize(
    ("layer", "x", "forms"),
    [
        (nn.Linear(6, 5), torch.randn(7, 6), ("input", "output")),
        (nn.Conv2d(3, 5, (3, 2), stride=2, padding=1), torch.randn(2, 3, 9, 8), ("output", "weight")),
        (nn.Conv2d(4, 6, 3, groups=2, padding="same", padding_mode="circular"), torch.randn(2, 4, 6, 6),
         ("output", "weight")),
    ],
    ids=["linear", "conv", "grouped conv"],
)  # fmt: skip
def test_the_forms_are_equal_in_values_and_gradients(
    layer: nn.Module, x: Tensor, forms: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = adapted(layer), x.double().requires_grad_()
    found = {}
    for form in forms:
        monkeypatch.setattr(thin_rotation, "cheapest", lambda *sizes, form=form: form)
        found[form] = outputs(model, x)
        with torch.no_grad():
            torch.testing.assert_close(model(x), found[form][0])
    first, second = found.values()
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)


@pytest.fixture
def at_inference() -> tuple[nn.Module, Tensor]:
    """A layer that keeps constants, after one call."""
    model, x = adapted(nn.Linear(16, 4)).eval(), torch.randn(3, 16, dtype=torch.float64)
    with torch.no_grad():
        model(x)
    assert model[0].isotune["default"]._kept.value.WU is not None
    return model, x


def check(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        kept = model(x)
    torch.testing.assert_close(kept, model(x).detach())


def test_constants_are_made_anew_when_the_adapter_changes(at_inference: tuple[nn.Module, Tensor]) -> None:
    model, x = at_inference
    with torch.no_grad():
        model[0].isotune["default"].U.add_(torch.randn(16, 4))
    check(model, x)


def test_constants_are_made_anew_when_the_layer_changes(at_inference: tuple[nn.Module, Tensor]) -> None:
    model, x = at_inference
    model[0].weight = nn.Parameter(torch.randn(4, 16, dtype=torch.float64), requires_grad=False)
    check(model, x)


def test_constants_follow_the_dtype(at_inference: tuple[nn.Module, Tensor]) -> None:
    model, x = at_inference
    model.float()
    with torch.no_grad():
        assert model(x.float()).dtype == torch.float32
    torch.testing.assert_close(model(x.float()).double(), model.double()(x), rtol=1e-4, atol=1e-4)


def test_constants_are_dropped_when_training_starts(at_inference: tuple[nn.Module, Tensor]) -> None:
    model, _ = at_inference
    model.train()
    assert model[0].isotune["default"]._kept.value is None


def test_constants_stay_out_of_copies_and_pickles(at_inference: tuple[nn.Module, Tensor]) -> None:
    model, x = at_inference
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other[0].isotune["default"]._kept.value is None
        check(other, x)
