"""What is particular to HRA: its starts, its sides, its penalty."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from isotune import HRA
from isotune.adapters.orthogonal.hra import HRAAdapter
from isotune.errors import OptionError
from isotune.linalg.householder import dense_reflections
from isotune.sites import require_site
from laws.layers import drawn_layer, input_for
from support import penalty_of


def build(settings: HRA, layer: nn.Module, seed: int = 0) -> Any:
    """An adapter for the layer, in the layer's dtype."""
    adapter = settings.build(require_site(layer, "layer"), torch.Generator().manual_seed(seed))
    return adapter.to(layer.weight.dtype)


def linear(n_in: int = 12, n_out: int = 9) -> nn.Linear:
    return nn.Linear(n_in, n_out).double().requires_grad_(False)


def moved(adapter: HRAAdapter) -> HRAAdapter:
    adapter.U.data += 0.3 * torch.randn_like(adapter.U)
    return adapter


def test_paired_start_is_the_identity_with_a_gradient_opposite_within_each_pair() -> None:
    layer = linear()
    adapter = build(HRA(rank=6), layer)
    site, x = require_site(layer, ""), torch.randn(20, 12, dtype=torch.float64)
    y = adapter(x, site)
    torch.testing.assert_close(y, layer(x), rtol=0, atol=1e-12)
    B, A = adapter.factors(site.weight)
    torch.testing.assert_close(B @ A, torch.zeros(9, 12, dtype=torch.float64), rtol=0, atol=1e-12)
    (y * torch.randn_like(y)).sum().backward()
    first, second = adapter.U.grad[:, 0::2], adapter.U.grad[:, 1::2]
    torch.testing.assert_close(first, -second)
    assert first.abs().amax(dim=0).min() > 1e-3
    # It turns the columns and does not stretch them.
    torch.testing.assert_close((adapter.U.grad * adapter.U).sum(0), torch.zeros(6, dtype=torch.float64))


def test_penalty_alone_keeps_a_paired_start_at_the_identity() -> None:
    layer = linear()
    adapter = build(HRA(rank=6, penalty=1.0), layer)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    before = adapter.U.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        penalty_of(adapter).backward()
        optimizer.step()
    assert not torch.allclose(adapter.U, before)
    torch.testing.assert_close(adapter.weight(layer.weight), layer.weight.detach(), rtol=0, atol=1e-10)


def test_columns_of_a_start_have_length_one() -> None:
    for start in ("paired", "random", "anchored"):
        U = build(HRA(rank=4, start=start), linear()).U
        torch.testing.assert_close(U.norm(dim=0), torch.ones(4, dtype=U.dtype), rtol=0, atol=1e-6)


def test_odd_rank_with_a_paired_start_is_refused_with_the_reason_and_ways_out() -> None:
    with pytest.raises(OptionError, match=r"rank=7 is odd.*determinant -1.*never the identity; use rank=8") as error:
        HRA(rank=7)
    assert "start='anchored'" in str(error.value)
    assert "start='random'" in str(error.value)


def test_strict_with_a_paired_start_is_refused() -> None:
    with pytest.raises(OptionError, match="strict forbids; use start='anchored' or 'random'"):
        HRA(rank=8, strict=True, start="paired")


def test_rank_larger_than_the_rotated_side_is_refused() -> None:
    with pytest.raises(OptionError, match="rank 10 is larger than the layer: its output side is 9"):
        build(HRA(rank=10, side="out"), linear())
    with pytest.raises(OptionError, match="rank 14 is larger than the layer: its input side is 12"):
        build(HRA(rank=14), linear())


@pytest.mark.parametrize("rank", [1, 3, 4])
@pytest.mark.parametrize("strict", [False, True])
def test_anchored_start_is_the_identity_at_any_rank_and_then_a_product_of_two(rank: int, strict: bool) -> None:
    layer = linear()
    adapter = build(HRA(rank=rank, strict=strict, start="anchored"), layer)
    torch.testing.assert_close(adapter.weight(layer.weight), layer.weight.detach(), rtol=0, atol=1e-6)
    anchor = dense_reflections(adapter.anchor)
    moved(adapter)
    columns = adapter.columns().detach()
    expected = layer.weight @ dense_reflections(columns[:, :rank]) @ anchor.mT
    torch.testing.assert_close(adapter.weight(layer.weight), expected, rtol=0, atol=1e-6)
    assert [name for name, _ in adapter.named_parameters()] == ["U"]
    assert torch.linalg.matrix_rank(expected - layer.weight, rtol=1e-6) == min(2 * rank, 9)


def test_strict_starts_anchored_unless_told_otherwise() -> None:
    assert HRA(strict=True).resolved_start == "anchored"
    assert HRA(strict=True).identity_at_start
    assert not HRA(strict=True, start="random").identity_at_start


def test_strict_random_start_is_a_symmetric_involution_at_full_distance() -> None:
    layer = linear(n_out=12)
    eye = torch.eye(12, dtype=torch.float64)
    H = moved(build(HRA(rank=3, strict=True, start="random"), layer)).weight(eye).detach()
    torch.testing.assert_close(H, H.mT)
    torch.testing.assert_close(H @ H, eye)
    assert (H - eye).norm() == pytest.approx(2 * 3**0.5)


@given(st.sampled_from(["linear", "gpt2_conv1d"]).flatmap(drawn_layer), st.integers(1, 2), st.integers(0, 99))
def test_side_out_is_the_transposed_product_before_the_weight(layer: nn.Module, pairs: int, seed: int) -> None:
    site = require_site(layer, "")
    rank = min(2 * pairs, site.out_features // 2 * 2)
    torch.manual_seed(seed)
    adapter = moved(build(HRA(rank=rank, side="out"), layer))
    expected = dense_reflections(adapter.U.detach()).mT @ site.weight
    torch.testing.assert_close(adapter.weight(site.weight).detach(), expected, rtol=0, atol=1e-10)
    x = input_for(layer)
    torch.testing.assert_close(
        adapter(x, site), site.forward_with(x, expected, site.bias).detach(), rtol=0, atol=1e-10
    )


def test_side_in_and_side_out_differ_on_a_square_layer() -> None:
    layer = linear(8, 8)
    inside, outside = (build(HRA(rank=2, start="random", side=side), layer) for side in ("in", "out"))
    assert torch.equal(inside.U, outside.U)
    assert not torch.allclose(inside.weight(layer.weight), outside.weight(layer.weight))


@pytest.mark.parametrize("side", ["in", "out"])
@given(drawn_layer("convolution"), st.integers(0, 99))
def test_any_convolution_equals_one_with_the_rotated_kernels(side: str, layer: nn.Conv2d, seed: int) -> None:
    torch.manual_seed(seed)
    site = require_site(layer, "")
    adapter = moved(build(HRA(rank=2, side=side), layer))
    H = dense_reflections(adapter.U.detach())
    W = layer.weight.detach().flatten(1)
    twin = copy.deepcopy(layer)
    twin.weight.data = (W @ H if side == "in" else H.mT @ W).reshape(layer.weight.shape)
    x = input_for(layer, seed=seed)
    torch.testing.assert_close(adapter(x, site), twin(x), rtol=0, atol=1e-9)


@given(drawn_layer("embedding"), st.integers(0, 99))
def test_embedding_is_rotated_on_its_output_side_whatever_side_says(layer: nn.Embedding, seed: int) -> None:
    torch.manual_seed(seed)
    adapter = moved(build(HRA(rank=2, side="in"), layer))
    assert adapter.U.shape == (layer.embedding_dim, 2)
    y = adapter(torch.arange(layer.num_embeddings), require_site(layer, "")).detach()
    torch.testing.assert_close(y, layer.weight.detach() @ dense_reflections(adapter.U.detach()), rtol=0, atol=1e-10)
    torch.testing.assert_close(y.norm(dim=1), layer.weight.detach().norm(dim=1))


@given(st.integers(1, 6), st.sampled_from(["in", "out"]), st.integers(0, 99))
def test_singular_values_and_norm_of_the_weight_are_kept(rank: int, side: str, seed: int) -> None:
    torch.manual_seed(seed)
    layer = linear()
    adapted = moved(build(HRA(rank=rank, start="anchored", side=side), layer)).weight(layer.weight).detach()
    expected = torch.linalg.svdvals(layer.weight)
    torch.testing.assert_close(torch.linalg.svdvals(adapted), expected, rtol=1e-6, atol=1e-6)


def test_penalty_is_its_weight_times_the_squared_or_plain_norm() -> None:
    adapters = {
        squared: build(HRA(rank=3, start="random", penalty=0.5, squared=squared), linear())
        for squared in (True, False)
    }
    U = adapters[True].U.detach()
    U = U / U.norm(dim=0)
    norm = (torch.eye(3, dtype=U.dtype) - U.mT @ U).norm()
    torch.testing.assert_close(penalty_of(adapters[True]).detach(), 0.5 * norm**2)
    torch.testing.assert_close(penalty_of(adapters[False]).detach(), 0.5 * norm)
    assert penalty_of(build(HRA(rank=2), linear())) == 0


def test_a_column_that_training_brings_to_zero_is_no_reflection() -> None:
    layer = linear()
    adapter = build(HRA(rank=3, start="random"), layer)
    adapter.U.data[:, 1] = 0
    expected = layer.weight @ dense_reflections(adapter.U.detach()[:, [0, 2]])
    torch.testing.assert_close(adapter.weight(layer.weight).detach(), expected.detach())
