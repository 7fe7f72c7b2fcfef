"""What is particular to LoRA: its scaling, its dropout, its start."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import isotune
from isotune import LoRA
from isotune.errors import OptionError
from isotune.sites import require_site


def build(settings: LoRA, layer: nn.Module, moved: bool = True) -> Any:
    adapter = settings.build(require_site(layer, "layer"), torch.Generator().manual_seed(0))
    if moved:
        adapter.A.data.normal_()
        adapter.B.data.normal_()
    return adapter


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({"rank": 4}, 1.0),
        ({"rank": 4, "alpha": 16}, 4.0),
        ({"rank": 4, "alpha": 16, "rslora": True}, 8.0),
        ({"rank": 4, "rslora": True}, 2.0),
        ({"rank": 3, "alpha": 0.5}, 0.5 / 3),
    ],
)
def test_change_is_alpha_over_rank_or_its_root_times_b_a(options: dict[str, Any], scale: float) -> None:
    layer = nn.Linear(7, 5)
    adapter = build(LoRA(**options), layer)
    expected = layer.weight + scale * adapter.B @ adapter.A
    torch.testing.assert_close(adapter.weight(layer.weight), expected)
    x = torch.randn(3, 7)
    torch.testing.assert_close(adapter(x, require_site(layer, "")), nn.functional.linear(x, expected, layer.bias))


@pytest.mark.parametrize(
    "layer", [nn.Linear(7, 5), Conv1D(5, 7), nn.Conv2d(3, 5, 3)], ids=["linear", "conv1d", "conv2d"]
)
def test_start_is_b_zero_and_a_within_one_over_the_root_of_its_inputs(layer: nn.Module) -> None:
    adapter = build(LoRA(rank=4), layer, moved=False)
    assert (adapter.B == 0).all()
    bound = 1 / math.sqrt(require_site(layer, "").in_features)
    assert 0.5 * bound < adapter.A.abs().max() <= bound


def test_start_at_an_embedding_is_a_zero_so_that_unseen_tokens_stay_as_they_are() -> None:
    layer = nn.Embedding(10, 6)
    adapter = build(LoRA(rank=4), layer, moved=False)
    assert (adapter.A == 0).all()
    y = adapter(torch.tensor([1, 2]), require_site(layer, ""))
    (y * torch.randn_like(y)).sum().backward()
    assert (adapter.A.grad[:, [0, *range(3, 10)]] == 0).all()
    assert (adapter.A.grad[:, 1:3] != 0).any()


def test_padding_token_of_an_embedding_stays_as_it_is() -> None:
    layer = nn.Embedding(6, 4, padding_idx=2)
    adapter = build(LoRA(rank=2), layer, moved=False)
    y = adapter(torch.arange(6), require_site(layer, ""))
    (y * torch.randn_like(y)).sum().backward()
    assert (adapter.A.grad[:, 2] == 0).all()
    assert (adapter.A.grad[:, 3] != 0).any()


def test_dropout_falls_on_the_adapter_path_only_and_only_while_training() -> None:
    layer = nn.Linear(64, 5)
    site, adapter = require_site(layer, ""), build(LoRA(rank=2, dropout=0.5), layer)
    x = torch.randn(400, 64)
    adapter.eval()
    exact = adapter(x, site)
    assert torch.equal(adapter(x, site), exact)
    adapter.train()
    first, second = adapter(x, site), adapter(x, site)
    assert not torch.equal(first, second)
    # With the low-rank path silent nothing is dropped, ...
    adapter.B.data.zero_()
    assert torch.equal(adapter(x, site), layer(x))
    # ... and what is dropped is x, scaled up so that the mean stays.
    relative = (first - exact).mean(0).norm() / (exact - layer(x)).std(0).norm()
    assert relative < 0.3


def test_dropout_leaves_token_indices_alone() -> None:
    layer = nn.Embedding(10, 6)
    adapter = build(LoRA(rank=2, dropout=0.9), layer).train()
    tokens = torch.arange(10)
    expected = layer.weight + (adapter.B @ adapter.A).mT
    torch.testing.assert_close(adapter(tokens, require_site(layer, "")), expected)


def test_rank_larger_than_the_smaller_side_is_refused() -> None:
    with pytest.raises(OptionError, match="rank 6 is larger than the layer: its smaller side is 5; choose a rank of"):
        build(LoRA(rank=6), nn.Linear(7, 5))


def test_padded_adapter_of_more_rank_than_the_layer_has_is_read_but_not_made(tmp_path: Path) -> None:
    model = isotune.adapt(nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 3)), LoRA(rank=3), ["0", "1"])
    model[0].isotune["default"].B.data.normal_()
    isotune.adapt(model, LoRA(rank=8), ["0"], name="more")
    isotune.use(model, "default", "more")
    assert isotune.export_lora(model, tmp_path).rank == 11
    x = torch.randn(4, 12)
    bare = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 3))
    bare.load_state_dict({k: t for k, t in model.state_dict().items() if "isotune" not in k})
    torch.testing.assert_close(isotune.load(bare, tmp_path)(x), model(x))
    with pytest.raises(OptionError, match="rank 11 is larger than the layer"):
        isotune.adapt(bare, LoRA(rank=11), ["1"], name="new")
