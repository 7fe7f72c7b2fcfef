"""What is particular to DeLoRA: the size of its change, and PEFT's files both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import settings as profile
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

import isotune
from isotune.adapters.low_rank.delora import DeLoRA
from isotune.errors import OptionError
from isotune.sites import require_site
from packed import NibbleLinear, pack
from peers import assert_both_ways, peft_adapt, peft_load
from support import adapted, assert_same_output, minilm, move, output, stories

LAYERS = [nn.Linear(7, 5), Conv1D(5, 7), nn.Conv2d(3, 5, 3), nn.Embedding(9, 5)]


def build(layer: nn.Module, moved: bool = True, **options: Any) -> Any:
    adapter = DeLoRA(**options).build(require_site(layer, "layer"), torch.Generator().manual_seed(0))
    return move(adapter, size=0.3) if moved else adapter.eval()


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize("rank", [1, 4])
def test_change_measured_by_the_columns_of_w_is_never_larger_than_lambda(layer: nn.Module, rank: int) -> None:
    W = require_site(layer, "").weight
    adapter = build(layer, rank=rank, boundary=3.0)
    columns = W.norm(dim=0)
    change = (adapter.weight(W) - W).detach() / columns
    boundary = float(adapter.get_parameter("lambda").detach())
    assert change.norm() <= boundary * 1.0001
    if rank == 1:
        assert change.norm() == pytest.approx(boundary, rel=1e-4)
    a, b = adapter.A / adapter.A.norm(dim=1, keepdim=True), adapter.B / adapter.B.norm(dim=0)
    torch.testing.assert_close(change, (boundary / rank * b @ a).detach(), rtol=1e-4, atol=1e-5)


def test_lengths_of_the_factors_do_not_matter() -> None:
    layer = nn.Linear(7, 5)
    adapter = build(layer, rank=3)
    before = adapter.weight(layer.weight)
    with torch.no_grad():
        adapter.A *= torch.tensor([[0.5], [2.0], [7.0]])
        adapter.B *= torch.tensor([3.0, 0.2, 1.5])
    torch.testing.assert_close(adapter.weight(layer.weight), before)


def test_start_changes_nothing_and_has_a_finite_gradient_because_short_columns_are_not_stretched() -> None:
    layer = nn.Linear(7, 5)
    adapter = build(layer, moved=False, rank=3)
    adapter(torch.randn(4, 7), require_site(layer, "")).square().sum().backward()
    assert torch.equal(adapter.weight(layer.weight), layer.weight)
    assert all(p.grad.isfinite().all() for p in adapter.parameters())
    adapter.B.data.fill_(1e-6)
    lengths = adapter.A.norm(dim=1, keepdim=True)
    expected = adapter.B / 1e-4 @ (adapter.A / lengths) * layer.weight.norm(dim=0) * 15 / 3
    torch.testing.assert_close(adapter.weight(layer.weight) - layer.weight, expected, rtol=1e-3, atol=1e-6)


def test_tokens_never_seen_stay_as_they_are() -> None:
    layer = nn.Embedding(10, 6)
    adapter = build(layer, moved=False, rank=2)
    assert (adapter.A == 0).all()
    y = adapter(torch.tensor([1, 2]), require_site(layer, ""))
    (y * torch.randn_like(y)).sum().backward()
    assert (adapter.A.grad[:, [0, *range(3, 10)]] == 0).all()
    assert (adapter.A.grad[:, 1:3] != 0).any()


@profile(max_examples=5)
@given(st.integers(1, 8), st.integers(1, 20), st.integers(0, 99))
def test_drawn_options_mean_the_same_in_peft_both_ways(
    tmp_path_factory: pytest.TempPathFactory, rank: int, boundary: int, seed: int
) -> None:
    targets = ["q_proj", "down_proj"]
    config = peft.DeloraConfig(r=rank, delora_lambda=boundary, target_modules=targets, rank_pattern={"q_proj": 3})
    ours = adapted(stories(), DeLoRA(rank=rank, boundary=boundary), targets, seed=seed)
    assert_both_ways(ours, peft_adapt(stories(), config, seed), stories, tmp_path_factory.mktemp("delora"))


def test_options_that_differ_by_layer_are_pefts_patterns(tmp_path: Path) -> None:
    overrides = {"value": {"rank": 6}, r".*layer\.1\..*query": {"boundary": 4.0}}
    ours = adapted(minilm(), DeLoRA(rank=3), ["query", "value"], overrides=overrides)
    theirs = peft_adapt(minilm(), peft.DeloraConfig(
        r=3, target_modules=["query", "value"], lambda_pattern={"value": 5}, init_weights=False, module_dropout=0.1
    ))  # fmt: skip
    assert_both_ways(ours, theirs, minilm, tmp_path)
    config = peft.DeloraConfig.from_pretrained(tmp_path / "ours")
    assert len(config.rank_pattern) == 6
    assert config.lambda_pattern == {"encoder.layer.1.attention.self.query": 4.0}
    loaded = isotune.load(minilm(), tmp_path / "theirs")
    settings = loaded.encoder.layer[0].attention.self.value.isotune.settings["default"]
    assert settings == DeLoRA(rank=3, boundary=5, dropout=0.1)


def test_lora_that_peft_makes_of_it_and_the_exported_one_are_the_same_function(tmp_path: Path) -> None:
    model = adapted(stories(), DeLoRA(rank=4), ["q_proj", "up_proj"])
    assert isotune.export_lora(model, tmp_path / "lora").residual < 1e-5
    assert_same_output(output(peft_load(stories(), tmp_path / "lora")), output(model))


def test_layers_that_pefts_delora_does_not_adapt_are_saved_as_isotunes_own(tmp_path: Path) -> None:
    model = adapted(nn.Sequential(nn.Conv2d(3, 6, 3)), DeLoRA(rank=2), ["0"])
    isotune.save(model, tmp_path)
    assert '"peft_type": "ISOTUNE_DELORA"' in (tmp_path / "adapter_config.json").read_text()
    assert "kind conv2d, which PEFT's DeLoRA does not adapt" in (tmp_path / "README.md").read_text()


def test_stored_adapter_goes_on_a_packed_base_that_cannot_be_dequantised(tmp_path: Path) -> None:
    model = adapted(stories(), DeLoRA(rank=2, boundary=1), "attention")
    isotune.save(model, tmp_path)
    packed = isotune.load(pack(stories(), NibbleLinear), tmp_path)
    assert_same_output(output(packed), output(model), 0.3)
    for name in ("A", "w_norm"):
        ours, theirs = (getattr(m.model.layers[0].self_attn.q_proj.isotune["default"], name) for m in (model, packed))
        assert torch.equal(ours, theirs)


def test_rank_larger_than_the_smaller_side_is_refused() -> None:
    with pytest.raises(OptionError, match="rank 6 is larger than the layer: its smaller side is 5"):
        build(nn.Linear(7, 5), rank=6)
    with pytest.raises(OptionError, match="delora: boundary=0"):
        DeLoRA(boundary=0)
