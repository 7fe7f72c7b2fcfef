"""The thin product that low-rank changes and rotations share, and the choice among equal forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from isotune.linalg.forms import cheapest
from isotune.linalg.householder import compact_wy, rotate
from isotune.linalg.thin import thin_add


def drawn(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def rotated(v: Tensor, U: Tensor) -> Tensor:
    return rotate(v, *compact_wy(U), transpose=True)


@pytest.mark.parametrize("scale", [1.0, -1.0, 0.3])
def test_the_product_is_what_it_says_and_twice_differentiable(scale: float) -> None:
    x, L, R, y = drawn((5, 4), (4, 2), (2, 3), (5, 3))

    def product(*tensors: Tensor) -> Tensor:
        return thin_add(*tensors, scale=scale)

    torch.testing.assert_close(product(x, L, R, y), y + scale * x @ L @ R)
    assert torch.autograd.gradcheck(product, (x, L, R, y))
    assert torch.autograd.gradgradcheck(product, (x, L, R, y))


def test_a_rotation_of_rows_is_twice_differentiable() -> None:
    v, U = drawn((2, 3, 6), (6, 4))
    assert torch.autograd.gradcheck(rotated, (v, U))
    assert torch.autograd.gradgradcheck(rotated, (v, U))


def test_gradients_that_are_not_needed_are_not_computed() -> None:
    x, L, R, y = drawn((5, 4), (4, 2), (2, 3), (5, 3))
    (only,) = torch.autograd.grad(thin_add(x.detach(), L, R.detach(), y.detach()).square().sum(), L)
    (among,) = torch.autograd.grad(thin_add(x, L, R, y).square().sum(), L)
    torch.testing.assert_close(only, among)


def test_per_sample_gradients_through_vmap_are_those_of_single_rows() -> None:
    v, U = drawn((5, 6), (6, 4))

    def loss(U: Tensor, row: Tensor) -> Tensor:
        return rotated(row, U).pow(3).sum()

    together = vmap(grad(loss), in_dims=(None, 0))(U, v[:, None])
    one_by_one = [torch.autograd.grad(loss(U, row), U)[0] for row in v[:, None]]
    torch.testing.assert_close(together, torch.stack(one_by_one))


def test_functional_calls_work_on_an_adapted_layer() -> None:
    import isotune

    model = isotune.adapt(torch.nn.Sequential(torch.nn.Linear(6, 6)), isotune.HRA(rank=2), ["0"])
    state = {name: p.detach() for name, p in model.named_parameters()}
    x = torch.randn(3, 6)
    gradients = grad(lambda s: functional_call(model, s, (x,)).square().sum())(state)
    model(x).square().sum().backward()
    torch.testing.assert_close(gradients["0.isotune.default.U"], model[0].isotune["default"].U.grad)


def test_it_compiles_whole() -> None:
    v, U = drawn((5, 6), (6, 4))
    compiled = torch.compile(rotated, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(v, U), rotated(v, U))
    expected = torch.autograd.grad(rotated(v, U).square().sum(), (v, U))
    torch.testing.assert_close(torch.autograd.grad(compiled(v, U).square().sum(), (v, U)), expected)


def test_backward_saves_the_rows_the_projection_and_the_factors() -> None:
    n, d, r = 64, 32, 4
    x, U = torch.randn(n, d, requires_grad=True), torch.randn(d, r, requires_grad=True)
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        rotated(x, U)
    # x; x M (n x r); Û and M (d x r each); S⁻¹ and the r norms.
    assert sum(storages.values()) == 4 * (n * d + n * r + 2 * d * r + r * r + r)


def test_autocast_does_not_lower_the_r_by_r_algebra() -> None:
    U = torch.randn(32, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = compact_wy(U)
    for got, wanted in zip(inside, compact_wy(U), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("training", [True, False])
def test_input_and_output_forms_cross_where_their_costs_do(training: bool) -> None:
    n, d, r = 4096, 512, 64
    choices = [cheapest(("input", "through"), n, d, n_out, r, training) for n_out in range(64, 4096, 64)]
    crossing = choices.index("input")
    assert crossing > 0
    assert choices == ["through"] * crossing + ["input"] * (len(choices) - crossing)
    # 12 n in r + 100 n in = 8 n in r + 4 n out r + 2 in out r in training, else
    # 4 n in r + 100 n in = 2 n r (in + out).
    wide = (4 * n * d * r + 100 * n * d) / (4 * n * r + 2 * d * r) if training else (2 * d * r + 100 * d) / (2 * r)
    assert crossing == math.ceil(wide / 64) - 1


def test_few_rows_pass_before_the_layer_and_many_beside_it() -> None:
    assert cheapest(("input", "through"), 64, 2048, 2048, 32) == "input"
    assert cheapest(("input", "through"), 16_384, 2048, 2048, 32) == "through"
    assert cheapest(("input", "through", "inside"), 65_536, 2048, 2048, 32) == "inside"


def test_rows_that_need_no_gradient_are_left_as_they_are_in_training() -> None:
    assert cheapest(("input", "through"), 256, 2048, 2048, 8, input_grad=True) == "input"
    assert cheapest(("input", "through"), 256, 2048, 2048, 8, input_grad=False) == "through"


def test_a_small_weight_is_rotated_itself_at_inference_on_many_rows() -> None:
    assert cheapest(("output", "weight"), 100_000, 27, 16, 8, training=False) == "weight"
    assert cheapest(("output", "weight"), 64, 576, 64, 8, training=False) == "output"
