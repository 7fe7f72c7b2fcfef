"""What is particular to SPLoPA: Kronecker products with prototypes that all layers share, and blocks left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import isotune
from isotune.adapters.sparse.splopa import SPLoPA
from laws.suite import check_law
from support import move


def model_of(**options: Any) -> Any:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5))
    settings = SPLoPA(**{"prototypes": 3, "block_rows": 2, "block_columns": 4, **options})
    return isotune.adapt(base, settings, ["0", "2"], seed=0)


def test_the_change_is_a_sum_of_kronecker_products_cut_off_at_the_edge() -> None:
    model = move(model_of().double(), size=0.5)
    for layer, shape in ((model[0], (3, 2)), (model[2], (3, 2))):
        adapter = layer.isotune["default"]
        c, r = adapter.shared["splopa_c"], adapter.shared["splopa_r"]
        assert tuple(adapter.M.shape) == shape
        D = sum(torch.kron(adapter.P[k], torch.outer(c[k], r[k])) for k in range(3))
        W = layer._parameters["weight"]
        torch.testing.assert_close(layer.weight, W + D[: W.shape[0], : W.shape[1]])


def test_the_law_on_dtypes_holds_where_all_blocks_are_left() -> None:
    small = st.integers(1, 3)
    whole = st.builds(SPLoPA, keep=st.just(1.0), prototypes=small, block_rows=small, block_columns=small)
    check_law(SPLoPA, "linear", "dtype_is_kept", whole)


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_blocks_are_left_out_over_all_layers_for_good_and_not_stored(p: float, tmp_path: Path) -> None:
    model = move(model_of(keep=0.5, start=0.0, end=0.5, p=p), size=0.2)
    layers = model[0], model[2]
    W = [layer.weight.detach() for layer in layers]
    isotune.after_step(model, 0.25)
    adapters = [layer.isotune["default"] for layer in layers]
    worth = torch.cat([
        torch.stack([
            w[i : i + 2, j : j + 4].norm(p) for i in range(0, w.shape[0], 2) for j in range(0, w.shape[1], 4)
        ])
        for w in W
    ])  # fmt: skip
    left = torch.cat([adapter.M.flatten() for adapter in adapters])
    assert int(left.sum()) == round((0.5 + 0.5 * 0.5**3) * 12)
    assert float(worth[left].min()) >= float(worth[~left].max())
    isotune.after_step(model, 0.6)
    later = torch.cat([adapter.M.flatten() for adapter in adapters])
    assert int(later.sum()) == 6
    assert not (later & ~left).any()
    for adapter, layer, w in zip(adapters, layers, W, strict=True):
        whole = adapter.M.repeat_interleave(2, 0)[: w.shape[0]].repeat_interleave(4, 1)[:, : w.shape[1]]
        torch.testing.assert_close(layer.weight, torch.where(whole, w, 0))
        assert not adapter.P[:, ~adapter.M].any()
    isotune.save(model, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for name, t in stored.items() if name.endswith("splopa_P")) == 3 * 6


def test_prototypes_belong_to_one_adapter_and_train_for_all_its_layers() -> None:
    one, other = model_of(), model_of()
    shared = [layer.isotune["default"].shared for layer in (one[0], one[2], other[0])]
    assert shared[0] is shared[1] is not shared[2]
    trained = sum(p.numel() for p in one.parameters() if p.requires_grad)
    assert trained == 3 * (2 + 4) + 3 * 6 + 3 * 6
    move(one)
    assert not other[0].isotune["default"].shared["splopa_c"].any()
    x = torch.randn(2, 8)
    torch.manual_seed(0)
    assert torch.equal(other(x), nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5))(x))
