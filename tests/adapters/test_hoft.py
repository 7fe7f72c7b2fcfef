"""What is particular to HOFT and SHOFT: two sides, paired starts, the exact and the cut-off inverse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import isotune
from isotune.errors import OptionError
from isotune.linalg.householder import dense_reflections
from isotune.sites import require_site
from support import adapted, assert_same_output, output, stories


def build(settings: Any, layer: nn.Module, seed: int = 0, size: float = 0.3) -> Any:
    """An adapter for the layer, in the layer's dtype, that is `size` off its start."""
    adapter = settings.build(require_site(layer, "layer"), torch.Generator().manual_seed(seed)).to(layer.weight.dtype)
    torch.manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.data += size * torch.randn_like(parameter)
    return adapter


def linear(n_in: int = 12, n_out: int = 9) -> nn.Linear:
    return nn.Linear(n_in, n_out).double().requires_grad_(False)


def sides(adapter: Any) -> tuple[Tensor, Tensor]:
    """Q_U and Q_V, one reflection after another."""
    return dense_reflections(adapter.outer.U.detach()), dense_reflections(adapter.inner.U.detach())


@pytest.mark.parametrize("name", ["hoft", "shoft"])
@given(st.integers(2, 7), st.integers(0, 99))
def test_weight_and_forward_are_the_dense_product_with_the_bias_added_after(name: str, rank: int, seed: int) -> None:
    layer = linear()
    adapter = build(isotune.method(name, rank=rank), layer, seed)
    Q_U, Q_V = sides(adapter)
    scaled = layer.weight if name == "hoft" else torch.diag(adapter.scale.m.detach()) @ layer.weight
    expected = Q_U @ scaled @ Q_V
    torch.testing.assert_close(adapter.weight(layer.weight).detach(), expected, rtol=0, atol=1e-12)
    x = torch.randn(5, 12, dtype=torch.float64)
    torch.testing.assert_close(
        adapter(x, require_site(layer, "")).detach(), x @ expected.mT + layer.bias, rtol=0, atol=1e-12
    )


@given(st.integers(2, 7), st.integers(0, 99))
def test_hoft_keeps_singular_values_and_shoft_does_not(rank: int, seed: int) -> None:
    layer = linear()
    values = torch.linalg.svdvals(layer.weight)
    hoft, shoft = (
        torch.linalg.svdvals(build(isotune.method(name, rank=rank), layer, seed).weight(layer.weight).detach())
        for name in ("hoft", "shoft")
    )
    torch.testing.assert_close(hoft, values, rtol=0, atol=1e-12)
    assert not torch.allclose(shoft, values, atol=1e-3)


@given(st.integers(2, 9), st.integers(0, 99))
def test_each_side_has_determinant_plus_or_minus_one_by_the_parity_of_its_reflections(rank: int, seed: int) -> None:
    adapter = build(isotune.method("hoft", rank=rank), linear(), seed)
    for side, d in ((adapter.inner, 12), (adapter.outer, 9)):
        Q = side.weight(torch.eye(d, dtype=torch.float64)).detach()
        torch.testing.assert_close(torch.linalg.det(Q), torch.tensor((-1.0) ** rank, dtype=torch.float64))


@pytest.mark.parametrize("rank", [2, 3, 4, 8, 9])
def test_paired_start_is_the_identity_and_an_odd_rank_ends_in_an_idle_zero_vector(rank: int) -> None:
    layer = linear()
    adapter = build(isotune.method("hoft", rank=rank), layer, size=0.0)
    torch.testing.assert_close(adapter.weight(layer.weight).detach(), layer.weight, rtol=0, atol=1e-12)
    adapter(torch.randn(6, 12, dtype=torch.float64), require_site(layer, "")).square().sum().backward()
    for side in (adapter.inner, adapter.outer):
        used = rank - rank % 2
        assert torch.equal(side.U[:, 0:used:2], side.U[:, 1:used:2])
        assert side.U.grad[:, :used].abs().amax(dim=0).min() > 0
        assert not side.U[:, used:].any()
        assert not side.U.grad[:, used:].any()


def test_two_terms_of_the_neumann_series_are_not_orthogonal_and_do_not_start_at_the_identity() -> None:
    layer = linear(64, 64)
    for rank in (2, 4, 8, 16):
        settings = isotune.method("hoft", rank=rank, inverse="neumann2")
        Q = build(settings, layer, size=0.0).inner.weight(torch.eye(64, dtype=torch.float64)).detach()
        distance = torch.linalg.matrix_norm(Q - torch.eye(64), ord=2)
        assert settings.identity_at_start == (rank == 2)
        assert (distance < 1e-12) == settings.identity_at_start
    assert distance > 2  # further than any orthogonal matrix can be
    Q = build(isotune.method("hoft", rank=2, inverse="neumann2"), layer).inner.weight(torch.eye(64).double())
    torch.testing.assert_close(Q @ Q.mT, torch.eye(64).double())


@given(st.integers(2, 6), st.integers(0, 99))
def test_neumann2_is_the_papers_formula_for_columns_of_any_length(rank: int, seed: int) -> None:
    side = build(isotune.method("hoft", rank=rank, inverse="neumann2"), linear(), seed).outer
    U = side.U.detach()
    gram = U.mT @ U
    D_inverse, A = torch.diag(2 / gram.diagonal()), torch.triu(gram, 1)
    expected = torch.eye(9, dtype=U.dtype) - U @ (D_inverse - D_inverse @ A @ D_inverse) @ U.mT
    torch.testing.assert_close(side.weight(torch.eye(9).double()).detach(), expected)


def test_length_of_the_vectors_does_not_matter() -> None:
    layer = linear()
    adapter = build(isotune.method("hoft", rank=4), layer)
    before = adapter.weight(layer.weight).detach()
    adapter.inner.U.data *= torch.tensor([0.1, 3.0, 1.0, 20.0], dtype=torch.float64)
    torch.testing.assert_close(adapter.weight(layer.weight).detach(), before)


def test_low_rank_form_has_twice_the_rank_and_shoft_has_none() -> None:
    layer = linear(40, 30)
    adapter = build(isotune.method("hoft", rank=4), layer)
    B, A = (factor.detach() for factor in adapter.factors(layer.weight))
    change = adapter.weight(layer.weight).detach() - layer.weight
    assert (B.shape, A.shape) == ((30, 8), (8, 40))
    torch.testing.assert_close(B @ A, change, rtol=0, atol=1e-12)
    assert torch.linalg.matrix_rank(change) == 8
    shoft = build(isotune.method("shoft", rank=4), layer)
    assert shoft.factors(layer.weight) is None
    assert torch.linalg.matrix_rank(shoft.weight(layer.weight).detach() - layer.weight) == 30


def test_rows_of_a_batch_can_use_different_hofts() -> None:
    model = adapted(stories(), isotune.method("hoft", rank=2), size=0.5, name="one", seed=1)
    isotune.adapt(model, isotune.method("hoft", rank=4), name="two", seed=2)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter) * parameter.requires_grad
    expected = torch.stack([output(isotune.use(model, name))[i] for i, name in enumerate(("one", "two"))])
    assert_same_output(output(isotune.use(model, rows=["one", "two"])), expected)


def test_rank_that_leaves_nothing_to_learn_or_does_not_fit_is_refused() -> None:
    with pytest.raises(OptionError, match="rank=1 is not usable"):
        isotune.method("hoft", rank=1)
    with pytest.raises(OptionError, match="rank 10 is larger than the layer: its smaller side is 9"):
        build(isotune.method("shoft", rank=10), linear())
