"""What is particular to GOFT and qGOFT: rotations in stages, sizes that are no powers of two, the relaxation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import isotune
from isotune.errors import OptionError
from isotune.linalg.givens import givens_product, givens_rotations
from isotune.sites import require_site
from support import penalty_of


def build(layer: nn.Module, size: float = 0.5, **options: Any) -> Any:
    """An adapter for the layer, in double precision, `size` off its start."""
    adapter = isotune.method("goft", **options).build(require_site(layer, ""), torch.Generator()).double()
    adapter.planes.data += size * torch.randn_like(adapter.planes)
    return adapter


def linear(n_in: int, n_out: int = 5) -> nn.Linear:
    return nn.Linear(n_in, n_out).double().requires_grad_(False)


@given(st.integers(2, 19), st.integers(0, 99))
def test_goft_is_a_rotation_at_any_width_and_keeps_singular_values(n_in: int, seed: int) -> None:
    torch.manual_seed(seed)
    layer = linear(n_in)
    adapter = build(layer)
    eye = torch.eye(n_in, dtype=torch.float64)
    R = adapter.weight(eye).detach()
    torch.testing.assert_close(R @ R.mT, eye)
    assert float(torch.linalg.det(R)) == pytest.approx(1)
    adapted = adapter.weight(layer.weight).detach()
    torch.testing.assert_close(adapted, layer.weight @ R)
    torch.testing.assert_close(torch.linalg.svdvals(adapted), torch.linalg.svdvals(layer.weight))
    assert adapter.planes.shape == (n_in - 1,)


def test_qgoft_starts_at_the_identity_and_includes_every_goft() -> None:
    layer = linear(11)
    torch.testing.assert_close(build(layer, size=0.0, relaxed=True).weight(layer.weight).detach(), layer.weight)
    strict, relaxed = build(layer), build(layer, relaxed=True)
    relaxed.planes.data = givens_rotations(strict.planes.detach())
    torch.testing.assert_close(relaxed.weight(layer.weight), strict.weight(layer.weight))


def test_penalty_is_on_the_angle_between_the_columns_and_not_on_their_lengths() -> None:
    adapter = build(linear(4), relaxed=True, penalty=0.5)
    expected = 0.5 * sum((G[:, 0] @ G[:, 1]) ** 2 for G in adapter.planes.detach())
    torch.testing.assert_close(penalty_of(adapter).detach(), expected)
    stretched = givens_rotations(torch.randn(3, dtype=torch.float64)) * torch.tensor([2.0, 0.5], dtype=torch.float64)
    adapter.planes.data = stretched
    torch.testing.assert_close(penalty_of(adapter).detach(), torch.zeros((), dtype=torch.float64))
    assert penalty_of(build(linear(4), relaxed=True)) == 0


def authors_second_code(angles: Tensor, d: int) -> Tensor:
    """Their R for d a power of two: cosines and sines are laid at the right axes, but neighbours are combined."""
    x, stages = torch.eye(d, dtype=angles.dtype), []
    stride, start, n = 1, 0, d // 2
    while n:
        c, s = torch.ones(d, dtype=angles.dtype), torch.zeros(d, dtype=angles.dtype)
        for axes in (slice(0, None, 2 * stride), slice(stride, None, 2 * stride)):
            c[axes], s[axes] = angles[start : start + n].cos(), angles[start : start + n].sin()
        stages.append((c, s))
        stride, start, n = 2 * stride, start + n, n // 2
    for c, s in reversed(stages):
        x = x * c + torch.stack([-x[:, 1::2], x[:, 0::2]], dim=-1).flatten(-2) * s
    return x


def test_authors_second_code_is_orthogonal_in_its_first_stage_only_and_ours_in_all() -> None:
    eye = torch.eye(8, dtype=torch.float64)
    first = torch.tensor([0.3, -0.7, 1.1, 0.2, 0, 0, 0], dtype=torch.float64)
    theirs = authors_second_code(first, 8)
    torch.testing.assert_close(theirs, givens_product(eye, givens_rotations(first), transpose=True))
    every = first + 0.5
    theirs, ours = authors_second_code(every, 8), givens_product(eye, givens_rotations(every))
    assert (theirs @ theirs.mT - eye).norm() > 0.1
    torch.testing.assert_close(ours @ ours.mT, eye)


def test_embedding_is_rotated_on_its_output_side() -> None:
    layer = nn.Embedding(7, 6).double().requires_grad_(False)
    adapter = build(layer)
    assert adapter.planes.shape == (5,)
    y = adapter(torch.arange(7), require_site(layer, "")).detach()
    torch.testing.assert_close(y.norm(dim=1), layer.weight.norm(dim=1))
    torch.testing.assert_close(y, givens_product(layer.weight, givens_rotations(adapter.planes.detach())))


def test_backward_keeps_less_than_two_copies_of_the_rows_and_not_one_for_each_stage() -> None:
    kept: dict[int, Tensor] = {}
    adapter = build(linear(1024)).float()
    x = torch.randn(8, 1024, requires_grad=True)

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        adapter.rotate(x, transpose=True)
    kept.pop(x.untyped_storage().data_ptr())
    numbers = sum(tensor.untyped_storage().nbytes() // 4 for tensor in kept.values())
    assert numbers < 2 * x.numel()  # one for each of the 10 stages would be 10 copies


def test_options_without_effect_or_planes_are_refused() -> None:
    with pytest.raises(OptionError, match=r"penalty=0.1 has nothing to act on.*use relaxed=True"):
        isotune.method("goft", penalty=0.1)
    with pytest.raises(OptionError, match="input side is 1, which has no plane"):
        build(linear(1))
