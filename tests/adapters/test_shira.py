"""What is particular to SHiRA: PEFT's positions, its two forms, and that nothing else of the weight moves."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from peft.tuners.shira.mask_functions import random_mask
from torch import nn

import isotune
from both_ways import assert_isotune_loads, assert_peft_loads, by_peft
from isotune.errors import CheckpointError, OptionError
from support import adapted, assert_same_output, minilm, output, stories

TARGETS = ["q_proj", "down_proj"]
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # PEFT makes sparse tensors


def shira(**options: int) -> isotune.Settings:
    return isotune.method("shira", **options)


def test_positions_are_those_that_peft_draws_and_all_else_stays() -> None:
    layer = nn.Linear(9, 7)
    W = layer.weight.detach().clone()
    model = adapted(nn.Sequential(layer), shira(rank=2, seed=5), ["0"], size=0.5)
    moved = model[0].weight.detach() != W
    assert torch.equal(moved, random_mask(nn.Linear(9, 7), r=2, random_seed=5))
    assert int(moved.sum()) == 2 * (9 + 7)
    assert int(torch.linalg.matrix_rank(model[0].weight.detach() - W)) > 2


def test_few_rows_and_many_have_the_same_change_and_gradients() -> None:
    model = adapted(nn.Sequential(nn.Linear(9, 7)), shira(rank=2), ["0"], size=0.5).double()
    adapter = model[0].isotune["default"]
    with torch.no_grad():
        weight, bias = model[0].weight, model[0].bias
    for n in (1, 400):
        x = torch.randn(n, 9, dtype=torch.float64, requires_grad=True)
        torch.testing.assert_close(model(x), x @ weight.mT + bias)
        g = torch.randn(n, 7, dtype=torch.float64)
        found = torch.autograd.grad(model(x), [x, adapter.values], g)
        torch.testing.assert_close(found[0], g @ weight)
        torch.testing.assert_close(found[1], (g.mT @ x.detach())[adapter.rows, adapter.cols])


def test_language_models_go_both_ways(tmp_path: Path) -> None:
    assert_peft_loads(stories, shira(rank=3, seed=7), tmp_path / "one", targets=TARGETS)
    model = assert_isotune_loads(
        stories, peft.ShiraConfig(r=3, random_seed=11, target_modules=TARGETS), tmp_path / "theirs"
    )
    assert model.model.layers[0].mlp.down_proj.isotune.settings["default"].seed == 11
    assert_peft_loads(minilm, shira(rank=2), tmp_path / "minilm", targets=["query"])


def test_positions_come_from_the_file_whatever_drew_them(tmp_path: Path) -> None:
    def diagonal(layer: nn.Linear, r: int, **_: object) -> torch.Tensor:
        count = r * (layer.in_features + layer.out_features)
        return (torch.arange(layer.weight.numel()) < count).view(layer.weight.shape).to(layer.weight)

    config = peft.ShiraConfig(r=3, target_modules=["q_proj"])
    config.mask_fn = diagonal
    theirs = by_peft(stories(), config, tmp_path)
    model = isotune.load(stories(), tmp_path).eval()
    assert_same_output(output(model), output(theirs))
    changed = model.model.layers[0].self_attn.q_proj.isotune["default"]
    assert int(changed.rows.max()) == 5


def test_a_file_with_places_outside_of_the_weight_is_refused(tmp_path: Path) -> None:
    model = adapted(stories(), shira(rank=2), ["q_proj"])
    model.model.layers[0].self_attn.q_proj.isotune["default"].rows[0] = 64
    isotune.save(model, tmp_path)
    with pytest.raises(CheckpointError, match="shira_indices has places outside of 64 x 64"):
        isotune.load(stories(), tmp_path)


def test_other_ranks_by_layer_are_isotunes_own(tmp_path: Path) -> None:
    model = adapted(stories(), shira(rank=2), TARGETS, overrides={"q_proj": {"rank": 1}})
    isotune.save(model, tmp_path)
    assert "ISOTUNE_SHIRA" in (tmp_path / "adapter_config.json").read_text()
    assert_same_output(output(isotune.load(stories(), tmp_path).eval()), output(model))


def test_more_entries_than_the_weight_has_are_refused() -> None:
    with pytest.raises(OptionError, match=r"rank 4 stands for 64 entries.* has 63; choose a rank of at most 3"):
        isotune.adapt(nn.Sequential(nn.Linear(9, 7)), shira(rank=4), ["0"])
