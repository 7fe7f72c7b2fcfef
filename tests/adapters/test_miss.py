"""What is particular to MiSS: one matrix for all shards, its narrow variant, and its older name, Bone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import settings as profile
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import isotune
from both_ways import assert_isotune_loads, assert_peft_loads, by_peft, through_peft
from isotune.checkpoint.files import CONFIG, TENSORS
from isotune.errors import OptionError
from isotune.sites import require_site
from support import adapted, assert_same_output, minilm, output, stories

LAYERS = ["q_proj", "o_proj", "down_proj"]  # 64 x 64 and 64 x 172, which few ranks divide


def built(n_in: int, n_out: int, **options: Any) -> Any:
    site = require_site(nn.Linear(n_in, n_out), "layer")
    adapter = isotune.method("miss", **options).build(site, torch.Generator())
    adapter.block.data.normal_()
    return adapter


def test_all_shards_of_the_weight_get_the_same_change_and_the_last_its_first_columns() -> None:
    W = torch.randn(5, 11)
    adapter = built(11, 5, rank=4)
    change = (adapter.weight(W) - W).detach()
    for shard in change.split(4, dim=1):
        torch.testing.assert_close(shard, adapter.block.detach().mT[:, : shard.shape[1]])
    assert torch.linalg.matrix_rank(change) == 4
    assert adapter.factors(W)[0].shape == (5, 4)


def test_narrow_matrix_is_repeated_along_the_outputs() -> None:
    W = torch.randn(6, 8)
    adapter = built(8, 6, rank=4, mini=2)
    change = (adapter.weight(W) - W).detach()
    torch.testing.assert_close(change[:2], change[2:4])
    torch.testing.assert_close(change[:2, :4], adapter.block.detach().mT)
    assert torch.linalg.matrix_rank(change) == 2


def test_layers_that_the_options_do_not_fit_are_refused() -> None:
    with pytest.raises(OptionError, match=r"mini=4 does not divide the layer's 6 outputs; choose a divisor"):
        built(8, 6, rank=2, mini=4)
    with pytest.raises(OptionError, match="rank 9 is larger than the layer: its input side is 8"):
        built(8, 6, rank=9)


@profile(max_examples=4)
@given(st.integers(1, 64), st.sampled_from([None, 1, 4, 32]), st.sampled_from([0.0, 0.5]))
def test_any_drawn_adapter_means_the_same_in_peft(
    tmp_path_factory: pytest.TempPathFactory, rank: int, mini: int | None, dropout: float
) -> None:
    folder = tmp_path_factory.mktemp("drawn")
    method = isotune.method("miss", rank=rank, mini=mini, dropout=dropout)
    assert_peft_loads(stories, method, folder / "one", targets=LAYERS, size=0.02)
    init = "mini" if mini else True
    config = peft.MissConfig(r=rank, mini_r=mini or 1, init_weights=init, miss_dropout=dropout, target_modules=LAYERS)
    model = assert_isotune_loads(stories, config, folder)
    assert model.model.layers[0].self_attn.q_proj.isotune.settings["default"] == method


def test_minilm_goes_both_ways(tmp_path: Path) -> None:
    targets = ["query", "intermediate.dense"]
    assert_peft_loads(minilm, isotune.method("miss", rank=24), tmp_path / "one", targets=targets, size=0.01)
    assert_isotune_loads(minilm, peft.MissConfig(r=50, init_weights=False, target_modules=targets), tmp_path)


def test_layers_that_peft_does_not_adapt_are_saved_as_isotunes_own(tmp_path: Path) -> None:
    model = adapted(minilm(), isotune.method("miss", rank=8), ["word_embeddings"], size=0.02)
    isotune.save(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["peft_type"] == "ISOTUNE_MISS"
    assert "is of the kind embedding, which PEFT does not adapt" in (tmp_path / "README.md").read_text()
    assert torch.equal(output(isotune.load(minilm(), tmp_path).eval()), output(model))


@pytest.mark.parametrize("variant", [True, "bat"])
def test_older_checkpoints_called_bone_are_read_and_saved_under_the_new_name(
    variant: bool | str, tmp_path: Path
) -> None:
    # Bone's arithmetic was MiSS's; its files differ in the names alone.
    theirs = by_peft(stories(), peft.MissConfig(r=4, init_weights=variant, target_modules=LAYERS), tmp_path / "miss")
    older = tmp_path / "bone"
    older.mkdir()
    config = json.loads((tmp_path / "miss" / CONFIG).read_text()) | {"peft_type": "BONE"}
    (older / CONFIG).write_text(json.dumps({k: v for k, v in config.items() if k not in ("mini_r", "miss_dropout")}))
    tensors = load_file(tmp_path / "miss" / TENSORS)
    save_file({name.replace("miss_block", "bone_block"): t for name, t in tensors.items()}, older / TENSORS)
    model = isotune.load(stories(), older).eval()
    assert_same_output(output(model), output(theirs))
    isotune.save(model, tmp_path / "again")
    assert_same_output(output(through_peft(stories(), tmp_path / "again")), output(theirs))


def test_bone_is_another_name_of_miss() -> None:
    assert isotune.method("bone", rank=16) == isotune.method("miss", rank=16)


def test_dropout_falls_on_the_adapter_path_only() -> None:
    layer = nn.Linear(64, 5)
    site, adapter = require_site(layer, ""), built(64, 5, rank=4, dropout=0.5)
    x = torch.randn(10, 64)
    adapter.train()
    assert not torch.equal(adapter(x, site), adapter(x, site))
    adapter.block.data.zero_()
    assert torch.equal(adapter(x, site), layer(x))
