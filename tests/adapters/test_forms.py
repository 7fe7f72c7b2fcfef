"""A changed layer is the same in every form."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import isotune
from isotune.adapters import thin_rotation
from isotune.linalg.forms import FLOPS_PER_NUMBER, inside_pays, price_on
from isotune.linalg.thin import thin_linear


def adapted(layer: nn.Module, **options: object) -> nn.Module:
    model = isotune.adapt(nn.Sequential(layer), isotune.HRA(rank=4, start="random", **options), ["0"], seed=0)
    return model.double()


def outputs(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    y = model(x)
    return (y, *torch.autograd.grad(y.square().sum(), [x, model[0].isotune["default"].U]))


@pytest.mark.parametrize(
    ("layer", "x", "forms"),
    [
        (nn.Linear(6, 5), torch.randn(7, 6), ("input", "through", "output", "inside")),
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
    first, *others = found.values()
    for other in others:
        for a, b in zip(first, other, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("where", ["before", "through", "beside", "inside"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_thin_change_is_the_same_before_its_layer_and_through_it_beside_it_and_inside(
    where: str, bias: bool
) -> None:
    width = 6 if where in ("before", "through") else 5
    x, L, R, W = (torch.randn(n, m, dtype=torch.float64, requires_grad=True) for n, m in
                  ((7, 6), (6, 2), (2, width), (5, 6)))  # fmt: skip
    W, b = W.detach(), torch.randn(5, dtype=torch.float64) if bias else None

    def changed(x: Tensor, L: Tensor, R: Tensor) -> Tensor:
        return thin_linear(where, x, W, b, L, R, 0.7)

    change = (L @ R).mT if width == 5 else W @ (L @ R).mT
    torch.testing.assert_close(changed(x, L, R), F.linear(x, W + 0.7 * change, b))
    assert torch.autograd.gradcheck(changed, (x, L, R))
    assert torch.autograd.gradgradcheck(changed, (x, L, R))
    assert torch.autograd.gradcheck(lambda L, R: changed(x.detach(), L, R), (L, R))
    assert torch.func.vmap(lambda rows: changed(rows, L, R))(torch.stack([x, 2 * x])).shape == (2, 7, 5)


def test_many_rows_put_the_change_inside_the_weight_in_fp32_and_never_in_low_precision() -> None:
    many = torch.randn(1, 64).expand(2**14, 64)
    assert inside_pays(many, 64, 8)
    assert not inside_pays(many[:64], 64, 8)
    assert not inside_pays(many.bfloat16(), 64, 8)


def test_a_card_is_priced_by_its_properties() -> None:
    h200 = SimpleNamespace(major=9, minor=0, multi_processor_count=132, clock_rate=1_980_000,
                           memory_clock_rate=3_201_000, memory_bus_width=6144)  # fmt: skip
    # 1 Pflop/s in bf16 and 67 Tflop/s in fp32, at 4.9 TB/s.
    assert 700 < price_on(h200, torch.bfloat16) < 1000
    assert 90 < price_on(h200, torch.float32) < 130
    assert price_on(SimpleNamespace(major=9, minor=0, multi_processor_count=132), torch.bfloat16) == FLOPS_PER_NUMBER
