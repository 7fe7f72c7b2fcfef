"""What is particular to TLoRA: its two rings, their start, its forms and its regularisers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import isotune
from isotune import Settings
from isotune.linalg.tensor_ring import ring_matrix
from isotune.model.catalogue import linear_site
from isotune.sites import require_site
from laws.layers import drawn_layer
from support import penalty_of


def tlora(**options: Any) -> Settings:
    return isotune.method("tlora", **options)


def build(settings: Settings, layer: nn.Module, seed: int = 0) -> Any:
    """A fresh adapter, in the layer's dtype."""
    generator = torch.Generator().manual_seed(seed)
    return settings.build(require_site(layer, "layer"), generator).to(layer.weight.dtype)


def moved(adapter: Any, size: float = 0.3) -> Any:
    for parameter in adapter.parameters():
        parameter.data += size * torch.randn_like(parameter)
    return adapter


def linear(n_in: int = 12, n_out: int = 10) -> nn.Linear:
    return nn.Linear(n_in, n_out).double().requires_grad_(False)


def transform(adapter: Any) -> Tensor:
    return ring_matrix([*adapter.A]).detach()


@st.composite
def drawn_options(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "rank": draw(st.integers(1, 4)),
        "transform_rank": draw(st.integers(1, 4)),
        "digits": draw(st.integers(1, 4)),
        "spread": draw(st.sampled_from([0.0, 0.1, 0.5])),
    }


@given(
    drawn_options(),
    st.sampled_from(["linear", "gpt2_conv1d", "convolution"]).flatmap(drawn_layer),
    st.integers(0, 99),
)
def test_start_is_the_identity_and_the_count_is_what_is_trained(
    options: dict[str, Any], layer: nn.Module, seed: int
) -> None:
    settings, W = tlora(**options), require_site(layer, "").weight
    adapter = build(settings, layer, seed)
    torch.testing.assert_close(transform(adapter), torch.eye(W.shape[1], dtype=W.dtype), rtol=0, atol=1e-6)
    B, C = adapter.residual()
    assert (B @ C == 0).all()
    assert sum(p.numel() for p in adapter.parameters()) == settings.parameter_count(
        linear_site(W.shape[1], W.shape[0])
    )


def test_count_is_the_papers_formula() -> None:
    # 768 = 12 * 8 * 8, 3072 = 16 * 16 * 12
    assert tlora(rank=4, transform_rank=2).parameter_count(linear_site(768, 3072)) == 4 * (144 + 64 + 64) + 16 * (
        28 + 44
    )


@given(drawn_options(), st.integers(1, 12), st.integers(1, 12))
def test_weight_is_the_weight_times_one_ring_plus_another(options: dict[str, Any], n_in: int, n_out: int) -> None:
    layer = linear(n_in, n_out)
    adapter = moved(build(tlora(**options), layer))
    residual = ring_matrix([core[:, None] for core in adapter.B] + [core[None] for core in adapter.C])
    # The cores of the one side count its index, those of the other side the other's.
    expected = layer.weight @ transform(adapter) + residual.reshape(n_out, n_in).detach()
    torch.testing.assert_close(adapter.weight(layer.weight).detach(), expected)


@given(drawn_options(), st.integers(1, 12), st.integers(1, 12), st.booleans())
def test_both_forms_have_the_same_output_and_gradients(
    options: dict[str, Any], n_in: int, n_out: int, few: bool
) -> None:
    layer = linear(n_in, n_out)
    adapter = moved(build(tlora(**options), layer))
    site, x = require_site(layer, ""), torch.randn(3, 2, n_in, dtype=torch.float64, requires_grad=True)
    adapter._rows_are_cheaper = lambda x, site: few
    y = adapter(x, site)
    expected = nn.functional.linear(x, adapter.weight(layer.weight), layer.bias)
    torch.testing.assert_close(y, expected)
    inputs, g = (x, *adapter.parameters()), torch.randn_like(y)
    for got, wanted in zip(torch.autograd.grad(y, inputs, g), torch.autograd.grad(expected, inputs, g), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(("rows", "through_rows"), [(4, True), (4000, False)])
def test_few_rows_are_transformed_and_many_go_through_the_weight(rows: int, through_rows: bool) -> None:
    layer = nn.Linear(64, 64).requires_grad_(False)
    adapter, x = build(tlora(), layer), torch.randn(rows, 64)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert adapter._rows_are_cheaper(x, require_site(layer, "")) == through_rows


def test_residual_has_at_most_the_square_of_its_ring_rank() -> None:
    layer = linear(16, 16)
    adapter = moved(build(tlora(rank=2), layer))
    change = adapter.weight(layer.weight) - layer.weight @ transform(adapter)
    assert torch.linalg.matrix_rank(change.detach(), rtol=1e-10) == 4


def kronecker_rank(T: Tensor, inner: int) -> int:
    """The number of Kronecker products of (outer x outer) with (inner x inner) matrices that T is the sum of."""
    outer = T.shape[0] // inner
    blocks = T.view(outer, inner, outer, inner).transpose(1, 2).reshape(outer**2, inner**2)
    return int(torch.linalg.matrix_rank(blocks, rtol=1e-6))


@pytest.mark.parametrize("spread", [0.0, 0.1])
def test_equal_entries_stay_equal_in_training_and_spread_ones_use_the_ring(spread: float) -> None:
    layer = linear(16, 16)
    adapter = build(tlora(digits=2, transform_rank=2, spread=spread), layer)
    x, goal = torch.randn(40, 16, dtype=torch.float64), torch.randn(40, 16, dtype=torch.float64)
    optimizer = torch.optim.Adam(adapter.A.parameters(), lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        (adapter(x, require_site(layer, "")) - goal).square().sum().backward()
        optimizer.step()
    assert (kronecker_rank(transform(adapter), 4) > 1) == (spread > 0)


@pytest.mark.parametrize("regularizer", ["identity", "orthogonal"])
@given(drawn_options())
def test_penalty_is_zero_at_the_start_with_a_finite_gradient_and_grows(
    regularizer: str, options: dict[str, Any]
) -> None:
    adapter = build(tlora(penalty=1.0, regularizer=regularizer, **options), linear())
    penalty = penalty_of(adapter)
    assert penalty.item() == pytest.approx(0, abs=1e-5)
    penalty.backward()
    assert all(core.grad.isfinite().all() for core in adapter.A)
    assert penalty_of(moved(adapter)) > 0.1


def test_penalties_are_the_papers_sums_of_norms_for_equal_entries() -> None:
    R = 2
    identity, orthogonal = (
        moved(build(tlora(penalty=0.5, transform_rank=R, spread=0.0, regularizer=name), linear()), 0.0)
        for name in ("identity", "orthogonal")
    )
    expected = {"identity": 0.0, "orthogonal": 0.0}
    torch.manual_seed(1)
    for one, other in zip(identity.A, orthogonal.A, strict=True):
        one.data += 0.3 * torch.randn_like(one)
        other.data.copy_(one)
        A, n = one.detach(), one.shape[0]
        eye = torch.eye(n, dtype=A.dtype)
        expected["identity"] += sum(float((A[:, :, r, s] - eye / R).norm()) for r in range(R) for s in range(R))
        for i in range(n):
            for j in range(n):
                core = sum(torch.kron(A[i, k], A[j, k]) for k in range(n))
                expected["orthogonal"] += float((core - eye[i, j] / R**2).norm())
    assert penalty_of(identity).item() == pytest.approx(0.5 * expected["identity"])
    assert penalty_of(orthogonal).item() == pytest.approx(0.5 * expected["orthogonal"])
    assert penalty_of(build(tlora(), linear())) == 0


def test_orthogonal_penalty_vanishes_for_an_orthogonal_transform_that_is_not_the_identity() -> None:
    options = {"penalty": 1.0, "transform_rank": 1, "spread": 0.0}
    identity, orthogonal = (build(tlora(regularizer=r, **options), linear()) for r in ("identity", "orthogonal"))
    for one, other in zip(identity.A, orthogonal.A, strict=True):
        rotation = torch.linalg.qr(torch.randn(one.shape[:2], dtype=one.dtype)).Q
        for core in (one, other):
            core.data.copy_(rotation[:, :, None, None])
    T = transform(orthogonal)
    torch.testing.assert_close(T @ T.mT, torch.eye(12, dtype=T.dtype))
    assert penalty_of(orthogonal) < 1e-6
    assert penalty_of(identity) > 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_identity_is_exact_in_half_precision_whatever_the_ring_rank(dtype: torch.dtype) -> None:
    layer = nn.Linear(12, 10).to(dtype)
    adapter, x = (
        tlora(transform_rank=3).build(require_site(layer, ""), torch.Generator()),
        torch.randn(6, 12).to(dtype),
    )
    assert torch.equal(adapter(x, require_site(layer, "")), layer(x))
    torch.testing.assert_close(adapter.weight(layer.weight), layer.weight, rtol=0, atol=0)
