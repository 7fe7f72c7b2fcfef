"""What is particular to SODA: its spectrum, its Kronecker factors, its start."""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import isotune
from isotune.adapters.orthogonal.soda import SODA
from isotune.errors import OptionError
from isotune.model.catalogue import linear_site
from isotune.sites import require_site
from support import adapted, assert_same_output, move, output, stories


def linear(n_in: int = 12, n_out: int = 9) -> nn.Linear:
    return nn.Linear(n_in, n_out).double().requires_grad_(False)


def build(settings: SODA, layer: nn.Module, size: float = 0.2) -> Any:
    """An adapter for the layer, off its start."""
    adapter = settings.build(require_site(layer, ""), torch.Generator()).double()
    return move(adapter, size=size)


@pytest.mark.parametrize(("n_in", "n_out"), [(12, 9), (9, 12), (7, 5), (8, 8)])
@pytest.mark.parametrize("rank", [None, 3])
def test_weight_is_the_papers_product(n_in: int, n_out: int, rank: int | None) -> None:
    W = (layer := linear(n_in, n_out)).weight.detach()
    adapter = build(SODA(rank=rank), layer)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    shifted = S.clone()
    k = rank or len(S)
    shifted[:k] = torch.relu(S[:k] + adapter.delta.detach())
    Q = reduce(torch.kron, [factor.detach() for factor in adapter.rotations()])
    torch.testing.assert_close(adapter.weight(W).detach(), (U * shifted) @ Vh @ Q.mT)
    torch.testing.assert_close(Q @ Q.mT, torch.eye(n_in, dtype=W.dtype))
    assert (Q - torch.eye(n_in)).norm() > 0.1


def test_singular_values_are_exactly_the_shifted_ones_and_none_is_below_zero() -> None:
    W = (layer := linear()).weight.detach()
    adapter = build(SODA(), layer)
    adapter.delta.data[:3] = -100
    expected = torch.relu(torch.linalg.svdvals(W) + adapter.delta.detach()).sort(descending=True).values
    torch.testing.assert_close(torch.linalg.svdvals(adapter.weight(W).detach()), expected)
    assert (expected == 0).sum() >= 3


def test_start_is_the_model_itself_or_the_shift_that_was_asked_for() -> None:
    W = (layer := linear()).weight.detach()
    assert torch.equal(build(SODA(), layer, 0.0).weight(W), W)
    moved = build(SODA(delta=1e-3), layer, 0.0).weight(W)
    torch.testing.assert_close(torch.linalg.svdvals(moved), torch.linalg.svdvals(W) + 1e-3)
    assert SODA().identity_at_start
    assert not SODA(delta=1e-3).identity_at_start


@given(st.integers(2, 40), st.integers(2, 40), st.integers(1, 4), st.one_of(st.none(), st.just(2)))
def test_trained_numbers_are_as_declared(n_in: int, n_out: int, count: int, rank: int | None) -> None:
    settings = SODA(count=count, rank=rank)
    adapter = settings.build(require_site(nn.Linear(n_in, n_out), ""), torch.Generator())
    trained = sum(p.numel() for p in adapter.parameters())
    k = rank or min(n_in, n_out)
    assert (
        trained
        == settings.parameter_count(linear_site(n_in, n_out))
        == k + sum(c * (c - 1) // 2 for c in adapter.sizes)
    )
    assert len(adapter.sizes) <= count


def test_factors_of_the_authors_can_be_asked_for() -> None:
    # 640: (8, 8, 10), 2048: (4, 8, 64), 1280: (4, 16, 20), 768: (6, 8, 16) in their code; the first is balanced.
    assert SODA().sizes(640) == (8, 8, 10)
    assert SODA(factors=(4, 8, 64)).sizes(2048) == (4, 8, 64)
    with pytest.raises(OptionError, match=r"factors=\(4, 8, 64\) do not multiply to .* 768; use for .*\(8, 8, 12\)"):
        SODA(factors=(4, 8, 64)).sizes(768)
    with pytest.raises(OptionError, match="rank 10 is larger than the layer"):
        build(SODA(rank=10), linear())


def test_files_hold_what_is_trained_and_nothing_of_the_decomposition(tmp_path: Path) -> None:
    model = adapted(stories(), SODA(), ["q_proj", "o_proj"])
    adapter = model.model.layers[0].self_attn.q_proj.isotune["default"]
    site = require_site(model.model.layers[0].self_attn.q_proj, "")
    assert {name: t.numel() for name, t in adapter.peft_state(site).items()} == {"soda_delta": 64, "soda_K": 18}
    isotune.save(model, tmp_path)
    assert torch.equal(output(isotune.load(stories(), tmp_path).eval()), output(model))


def test_signs_and_order_of_the_decomposition_do_not_matter() -> None:
    layer, x = linear(), torch.randn(5, 12, dtype=torch.float64)
    adapter, site = build(SODA(), layer), require_site(layer, "")
    expected = adapter(x, site)
    adapter.U.neg_()
    adapter.Vh.neg_()
    assert_same_output(adapter(x, site), expected, 1e-12)
