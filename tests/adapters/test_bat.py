"""What is particular to BAT: blocks that are multiplied and shifted, in the cheaper of two forms."""

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

import isotune
from both_ways import assert_isotune_loads, assert_peft_loads, by_peft
from isotune.adapters.low_rank import bat
from isotune.bare import bare
from isotune.errors import NoLowRankFormError, OptionError
from support import adapted, assert_same_output, stories

LAYERS = ["q_proj", "up_proj"]  # 64 x 64 and 172 x 64: blocks of 1, 2 or 4


def square(size: float = 0.3, **options: Any) -> Any:
    torch.manual_seed(1)
    return adapted(nn.Sequential(nn.Linear(12, 8)), isotune.method("bat", **options), ["0"], size=size)


@pytest.mark.parametrize("grad", [True, False])
def test_few_rows_run_on_activations_and_many_through_the_weight_with_one_result(
    grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    rows_form = bat.block_affine_rows
    monkeypatch.setattr(bat, "block_affine_rows", lambda *a: calls.append(1) or rows_form(*a))
    model = square(rank=4)
    x = torch.randn(5, 12, requires_grad=grad)
    many, few = model(x), torch.cat([model(x[:2]), model(x[2:])])
    assert len(calls) == 2
    torch.testing.assert_close(few, many)
    if grad:
        values = [x, *model[0].isotune["default"].parameters()]
        for a, b in zip(
            torch.autograd.grad(few.sin().sum(), values),
            torch.autograd.grad(many.sin().sum(), values),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


def test_change_is_of_full_rank_and_no_lora(tmp_path: Path) -> None:
    model = square(rank=4)
    W = bare(model[0], "weight")
    change = model[0].isotune["default"].weight(W) - W
    assert torch.linalg.matrix_rank(change.detach()) == 8
    with pytest.raises(NoLowRankFormError, match="bat has no exact low-rank form"):
        isotune.export_lora(model, tmp_path)


def test_blocks_that_do_not_divide_the_layer_are_refused_with_those_that_do() -> None:
    with pytest.raises(
        OptionError, match=r"blocks of 3 do not divide .* 12 inputs and 8 outputs; choose a divisor of 4"
    ):
        square(rank=3)


@profile(max_examples=3)
@given(st.sampled_from([1, 2, 4]), st.integers(0, 99))
def test_any_drawn_adapter_means_the_same_in_peft(
    tmp_path_factory: pytest.TempPathFactory, rank: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("drawn")
    method = isotune.method("bat", rank=rank)
    assert_peft_loads(stories, method, folder / "one", targets=LAYERS, size=0.02, seed=seed)
    config = peft.MissConfig(r=rank, init_weights="bat", target_modules=LAYERS)
    model = assert_isotune_loads(stories, config, folder)
    assert model.model.layers[0].self_attn.q_proj.isotune.settings["default"] == method


def test_unfolding_restores_the_weight_where_pefts_unmerging_inverts_a_singular_matrix(tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = by_peft(
        nn.Sequential(nn.Linear(8, 8)),
        peft.MissConfig(r=4, init_weights="bat", target_modules=["0"]),
        tmp_path / "theirs",
    )
    theirs.base_model.model[0].miss_block["default"].data[0] = -torch.eye(4)
    theirs.save_pretrained(tmp_path / "theirs")
    base = theirs.base_model.model[0].base_layer.weight.detach().clone()
    model = nn.Sequential(nn.Linear(8, 8))
    model[0].load_state_dict(theirs.base_model.model[0].base_layer.state_dict())
    x = torch.randn(6, 8)
    isotune.load(model, tmp_path / "theirs")
    assert_same_output(model(x), theirs(x))
    isotune.fold(model)
    assert_same_output(model(x), theirs(x))
    isotune.unfold(model)
    assert torch.equal(bare(model[0], "weight"), base)
    theirs.merge_adapter()
    with pytest.raises(RuntimeError, match="singular"):
        theirs.unmerge_adapter()
