"""What is particular to ETHER and ETHER+: blocks, their distance from the identity, and both sides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import isotune
from isotune.errors import OptionError
from isotune.sites import require_site


def build(layer: nn.Module, name: str, size: float = 0.5, **options: Any) -> Any:
    """An adapter for the layer, in double precision, `size` off its start."""
    adapter = isotune.method(name, **options).build(require_site(layer, ""), torch.Generator()).double()
    for parameter in adapter.parameters():
        parameter.data += size * torch.randn_like(parameter)
    return adapter


def linear(n_in: int = 12, n_out: int = 8) -> nn.Linear:
    return nn.Linear(n_in, n_out).double().requires_grad_(False)


def outer(u: Tensor) -> Tensor:
    """û ûᵀ."""
    u = u.detach() / u.detach().norm()
    return torch.outer(u, u)


def reflections(u: Tensor) -> Tensor:
    return torch.block_diag(*(torch.eye(len(row), dtype=u.dtype) - 2 * outer(row) for row in u))


def exchanges(u: Tensor, v: Tensor) -> Tensor:
    blocks = zip(u, v, strict=True)
    return torch.block_diag(*(torch.eye(len(a), dtype=a.dtype) - outer(a) + outer(b) for a, b in blocks))


@pytest.mark.parametrize("blocks", [1, 2, 4])
@given(st.integers(0, 99))
def test_ether_is_one_reflection_for_each_block_of_columns(blocks: int, seed: int) -> None:
    torch.manual_seed(seed)
    layer = linear()
    adapter = build(layer, "ether", blocks=blocks)
    expected = layer.weight @ reflections(adapter.u)
    torch.testing.assert_close(adapter.weight(layer.weight).detach(), expected)
    x = torch.randn(3, 12, dtype=torch.float64)
    torch.testing.assert_close(adapter(x, require_site(layer, "")).detach(), x @ expected.mT + layer.bias)
    B, A = adapter.factors(layer.weight)
    assert (B.shape, A.shape) == ((8, blocks), (blocks, 12))


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_ether_is_its_own_inverse_at_a_fixed_distance_from_the_identity(blocks: int) -> None:
    eye = torch.eye(12, dtype=torch.float64)
    for size in (0.0, 0.5, 5.0):
        H = build(linear(), "ether", size=size, blocks=blocks).weight(eye).detach()
        torch.testing.assert_close(H @ H, eye)
        assert float((H - eye).norm()) == pytest.approx(2 * blocks**0.5)
    assert not isotune.method("ether").identity_at_start


def test_blocks_of_the_authors_memory_layout_are_not_blocks_of_columns() -> None:
    layer = linear()
    adapter = build(layer, "ether", blocks=2)
    H = torch.stack([torch.eye(6, dtype=torch.float64) - 2 * outer(row) for row in adapter.u])
    # What their code computes: the first half of W's numbers in memory meets the first block, the second the other.
    theirs = torch.einsum("kfm,kmn->kfn", layer.weight.reshape(2, 8, 6), H).reshape(8, 12)
    assert not torch.allclose(adapter.weight(layer.weight).detach(), theirs, atol=0.1)
    # It is no linear map of the columns: rows of W with the same numbers come out different.
    same = layer.weight[:1].repeat(8, 1)
    theirs = torch.einsum("kfm,kmn->kfn", same.reshape(2, 8, 6), H).reshape(8, 12)
    assert not torch.allclose(theirs[0], theirs[7], atol=0.1)
    ours = adapter.weight(same).detach()
    torch.testing.assert_close(ours[0], ours[7])


def test_embedding_is_reflected_on_its_output_side() -> None:
    layer = nn.Embedding(7, 6).double().requires_grad_(False)
    adapter = build(layer, "ether", blocks=3)
    y = adapter(torch.arange(7), require_site(layer, "")).detach()
    torch.testing.assert_close(y, layer.weight @ reflections(adapter.u))


@pytest.mark.parametrize("blocks", [1, 2, 4])
@given(st.integers(0, 99))
def test_ether_plus_exchanges_directions_on_both_sides(blocks: int, seed: int) -> None:
    torch.manual_seed(seed)
    layer = linear()
    adapter = build(layer, "ether_plus", blocks=blocks)
    left, right = (exchanges(side.u, side.v) for side in (adapter.outer, adapter.inner))
    expected = left @ layer.weight @ right
    torch.testing.assert_close(adapter.weight(layer.weight).detach(), expected)
    x = torch.randn(3, 12, dtype=torch.float64)
    torch.testing.assert_close(adapter(x, require_site(layer, "")).detach(), x @ expected.mT + layer.bias)
    B, A = adapter.factors(layer.weight)
    torch.testing.assert_close((B @ A).detach(), expected - layer.weight)
    assert B.shape[1] == A.shape[0] == 4 * blocks


def test_ether_plus_is_the_identity_where_u_and_v_agree_up_to_sign_and_bounded_elsewhere() -> None:
    eye = torch.eye(12, dtype=torch.float64)
    side = build(linear(), "ether_plus", size=0.0).inner
    torch.testing.assert_close(side.weight(eye).detach(), eye)
    side.v.data *= -3
    torch.testing.assert_close(side.weight(eye).detach(), eye)
    side.v.data = torch.randn_like(side.v)
    H = side.weight(eye).detach()
    assert 0.1 < (H - eye).norm() < 2**0.5
    assert not torch.allclose(H @ H.mT, eye, atol=0.1)
    # At orthogonal vectors the distance is the largest, and one direction is lost.
    side.v.data -= (side.v @ side.u.mT) / (side.u @ side.u.mT) * side.u
    H = side.weight(eye).detach()
    assert float((H - eye).norm()) == pytest.approx(2**0.5)
    assert float((H @ side.u.detach().mT).norm()) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", ["ether", "ether_plus"])
def test_blocks_that_do_not_divide_or_leave_nothing_to_learn_are_refused(name: str) -> None:
    with pytest.raises(OptionError, match="blocks=5 does not cut the input side, 12, into equal blocks"):
        build(linear(), name, blocks=5)
    with pytest.raises(OptionError, match="of at least 2"):
        build(linear(), name, blocks=12)
    with pytest.raises(OptionError, match="blocks=0 is not usable"):
        isotune.method(name, blocks=0)


def test_ether_plus_needs_blocks_that_divide_both_sides() -> None:
    with pytest.raises(OptionError, match="blocks=3 does not cut the output side, 8"):
        build(linear(), "ether_plus", blocks=3)
