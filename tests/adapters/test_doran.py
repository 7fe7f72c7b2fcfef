"""What is particular to DoRAN: the learned number in the denominator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import nn

import isotune
from isotune.adapters.low_rank.dora import DoRA
from isotune.adapters.low_rank.doran import DoRAN
from isotune.errors import OptionError
from isotune.sites import require_site
from laws.suite import check_law
from support import adapted, move, output, stories


def build(layer: nn.Module, moved: bool = True, **options: Any) -> Any:
    adapter = DoRAN(**options).build(require_site(layer, "layer"), torch.Generator().manual_seed(0))
    return move(adapter, size=0.3) if moved else adapter.eval()


@pytest.mark.parametrize("per_row", [False, True])
def test_rows_are_divided_by_their_length_plus_tau(per_row: bool) -> None:
    layer = nn.Linear(7, 5)
    adapter = build(layer, rank=2, tau=0.5, tau_per_row=per_row)
    assert adapter.t.shape == ((5,) if per_row else (1,))
    V = layer.weight + adapter.product.B @ adapter.product.A
    expected = (adapter.magnitude / (V.norm(dim=1) + F.softplus(adapter.t)))[:, None] * V
    torch.testing.assert_close(adapter.weight(layer.weight), expected)


@pytest.mark.parametrize("tau", [1e-6, 0.1, 3.0, 500.0])
def test_start_has_the_tau_asked_for_and_changes_nothing(tau: float) -> None:
    layer = nn.Linear(7, 5)
    adapter = build(layer, moved=False, rank=2, tau=tau)
    torch.testing.assert_close(F.softplus(adapter.t.detach()), torch.tensor([tau]))
    torch.testing.assert_close(adapter.weight(layer.weight), layer.weight)


def test_vanishing_tau_is_dora_and_a_large_one_no_longer_normalises() -> None:
    layer = nn.Linear(7, 5)
    site = require_site(layer, "")
    dora = move(DoRA(rank=2).build(site, torch.Generator().manual_seed(0)), size=0.3)
    doran = build(layer, rank=2)
    doran.load_state_dict(dora.state_dict() | {"t": torch.tensor([-40.0])})
    torch.testing.assert_close(doran.weight(layer.weight), dora.weight(layer.weight))
    doran.t.data.fill_(1e6)
    V = layer.weight + doran.product.B @ doran.product.A
    torch.testing.assert_close(1e6 * doran.weight(layer.weight), doran.magnitude[:, None] * V, rtol=1e-4, atol=1e-4)


def test_zero_row_can_be_trained() -> None:
    layer = nn.Linear(7, 5)
    layer.weight.data[3] = 0
    layer.requires_grad_(False)
    adapter = build(layer, moved=False, rank=2)
    adapter(torch.randn(4, 7), require_site(layer, "")).square().sum().backward()
    assert adapter.product.B.grad[3].abs().min() > 0
    dora = DoRA(rank=2).build(require_site(layer, ""), torch.Generator().manual_seed(0))
    dora(torch.randn(4, 7), require_site(layer, "")).square().sum().backward()
    assert (dora.product.B.grad[3] == 0).all()


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_without_the_detached_norm_the_gradient_is_the_derivative(kind: str) -> None:
    check_law(DoRAN, kind, "gradients_are_derivatives", st.just(DoRAN(rank=2, detach_norm=False, tau_per_row=True)))


def test_it_is_saved_under_isotunes_own_type(tmp_path: Path) -> None:
    model = adapted(stories(), DoRAN(rank=4, tau=0.3), ["q_proj"])
    isotune.save(model, tmp_path)
    assert '"peft_type": "ISOTUNE_DORAN"' in (tmp_path / "adapter_config.json").read_text()
    assert torch.equal(output(isotune.load(stories(), tmp_path).eval()), output(model))


def test_tau_must_be_positive() -> None:
    with pytest.raises(OptionError, match="doran: tau=0"):
        DoRAN(tau=0)
