"""What is particular to LoLDU: pivots of the weight itself, its starts, and loading without a decomposition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import isotune
from isotune import Settings
from isotune.adapters.spectral import loldu as module
from isotune.errors import OptionError
from isotune.linalg.ldu import leading_ldu
from isotune.model.adapted import bare_state
from isotune.sites import require_site
from laws.layers import drawn_layer
from support import adapted, files


def loldu(**options: Any) -> Settings:
    return isotune.method("loldu", **options)


def build(settings: Settings, layer: nn.Module, seed: int = 0) -> Any:
    """A fresh adapter, in the layer's dtype."""
    generator = torch.Generator().manual_seed(seed)
    return settings.build(require_site(layer, "layer"), generator).to(layer.weight.dtype)


def papers_weight(W: Tensor, z: Tensor, sigma: float, first_sigma: float) -> Tensor:
    """W_res + σ P L_r diag(z) U_r, from torch's decomposition of all of W."""
    r = len(z)
    P, L, U = torch.linalg.lu(W)
    PL, D, U = (P @ L)[:, :r], U.diagonal()[:r], U[:r] / U.diagonal()[:r, None]
    return W - first_sigma * PL * D @ U + sigma * PL * z @ U


@given(st.sampled_from(["linear", "gpt2_conv1d", "convolution", "embedding"]).flatmap(drawn_layer), st.data())
def test_weight_is_the_papers_for_any_pivots_and_scalar(layer: nn.Module, data: st.DataObject) -> None:
    W = require_site(layer, "").weight
    r = data.draw(st.integers(1, min(W.shape)))
    adapter = build(loldu(rank=r, alpha=3.0), layer)
    adapter.z.data += torch.randn(r, dtype=W.dtype, generator=torch.Generator().manual_seed(r))
    adapter.sigma.data.fill_(0.7)
    expected = papers_weight(W, adapter.z.detach(), 0.7, 3.0 / r)
    # The pivots are kept in fp32, and may be small.
    torch.testing.assert_close(adapter.weight(W).detach(), expected, rtol=1e-3, atol=1e-4)


def test_start_is_the_weight_bit_for_bit_and_trains_rank_plus_one_numbers() -> None:
    layer = nn.Linear(12, 9)
    adapter = build(loldu(rank=5), layer)
    assert torch.equal(adapter.weight(layer.weight), layer.weight)
    x = torch.randn(4, 12)
    assert torch.equal(adapter(x, require_site(layer, "")), layer(x))
    assert {name: tuple(p.shape) for name, p in adapter.named_parameters()} == {"z": (5,), "sigma": ()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_half_precision_are_decomposed_in_fp32(dtype: torch.dtype) -> None:
    layer = nn.Linear(12, 9).to(dtype)
    expected = leading_ldu(layer.weight.detach().float(), 4)
    adapter = loldu(rank=4).build(require_site(layer, ""), torch.Generator())
    for got, wanted in zip((adapter.PL, adapter.first_z, adapter.U), expected, strict=True):
        assert got.dtype == torch.float32
        assert torch.equal(got, wanted)


def test_change_has_at_most_the_rank_asked_for_and_not_twice_that() -> None:
    layer = nn.Linear(12, 9).double()
    adapter = build(loldu(rank=3), layer)
    adapter.z.data += 1.0
    adapter.sigma.data += 1.0
    change = adapter.weight(layer.weight) - layer.weight
    assert torch.linalg.matrix_rank(change.detach(), rtol=1e-10) == 3


def test_other_starts_put_other_pivots_in_the_place_of_the_weights() -> None:
    layer = nn.Linear(12, 9)
    D = build(loldu(rank=4), layer).first_z
    starts = {s: build(loldu(rank=4, start=s), layer).z.detach() for s in ("uniform", "constant", "ones", "zeros")}
    assert (starts["ones"] == 1).all()
    assert (starts["zeros"] == 0).all()
    torch.testing.assert_close(starts["constant"], D.mean().expand(4))
    assert (starts["uniform"].abs() <= D.mean().abs() / 2).all()
    assert not torch.equal(starts["uniform"], build(loldu(rank=4, start="uniform"), layer, seed=1).z)
    # They change the model, and say so: at zero the leading part of the weight is gone.
    zeros = build(loldu(rank=9, alpha=9.0, start="zeros"), layer)
    torch.testing.assert_close(zeros.weight(layer.weight), torch.zeros(9, 12), rtol=0, atol=1e-6)
    assert [loldu(start=s).identity_at_start for s in ("lu", "zeros")] == [True, False]


def test_dead_inputs_leave_everything_finite() -> None:
    layer = nn.Linear(8, 6)
    layer.weight.data[:, :3] = 0
    model = adapted(nn.Sequential(layer), loldu(rank=6), ["0"], size=1.0)
    y = model(torch.randn(5, 8))
    y.square().sum().backward()
    assert y.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_loading_decomposes_nothing_and_does_not_depend_on_the_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = nn.Sequential(nn.Linear(12, 9))
    x = torch.randn(4, 12)
    model = adapted(nn.Sequential(nn.Linear(12, 9)), loldu(rank=4), ["0"], size=1.0)
    base.load_state_dict({f"0.{k}": v for k, v in bare_state(model[0]).items()})
    isotune.save(model, tmp_path / "one")
    monkeypatch.setattr(module, "leading_ldu", lambda *_: pytest.fail("decomposed"))
    loaded = isotune.load(base, tmp_path / "one")
    assert torch.equal(loaded(x), model(x))
    isotune.save(loaded, tmp_path / "two")
    assert files(tmp_path / "one") == files(tmp_path / "two")


def test_rank_larger_than_the_smaller_side_is_refused() -> None:
    with pytest.raises(OptionError, match="rank 10 is larger than the layer: its smaller side is 9"):
        build(loldu(rank=10), nn.Linear(12, 9))
    with pytest.raises(OptionError, match="its smaller side is 9"):
        loldu(rank=10).shell(require_site(nn.Linear(12, 9), ""))
