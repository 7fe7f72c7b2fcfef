"""Linear, task arithmetic and slerp: weighted sums, with their own weights."""

from __future__ import annotations

import math
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from isotune.errors import OptionError
from isotune.linalg.change import dense, product, size
from isotune.linalg.low_rank import Factored
from isotune.merging.rules.linear import Linear
from isotune.merging.rules.slerp import Slerp
from isotune.merging.rules.sum import Sum
from isotune.merging.rules.task_arithmetic import TaskArithmetic
from merging.drawn import factored, merge, site, tensors


def test_linear_is_the_weighted_mean() -> None:
    changes = tensors(3, 5, 4)
    expected = (changes[0] + 2 * changes[1] - 0.5 * changes[2]) / 2.5
    torch.testing.assert_close(merge(Linear(), site(changes, (1, 2, -0.5))), expected)
    torch.testing.assert_close(merge(Linear(normalize=False), site(changes, (1, 2, -0.5))), expected * 2.5)


def test_linear_refuses_weights_that_sum_to_zero() -> None:
    with pytest.raises(OptionError, match=r"1, -0.7, -0.3 sum to 0.*normalize=False"):
        merge(Linear(), site(tensors(3, 2, 2), (1.0, -0.7, -0.3)))
    merge(Linear(normalize=False), site(tensors(3, 2, 2), (1.0, -0.7, -0.3)))


def test_task_arithmetic_of_weights_that_sum_to_one_is_the_mean() -> None:
    here = site(factored(3, 7, 5, 2), (0.2, 0.5, 0.3))
    torch.testing.assert_close(merge(TaskArithmetic(), here), merge(Linear(), here))
    torch.testing.assert_close(merge(TaskArithmetic(scale=0.3), here), 0.3 * merge(Linear(), here))


@pytest.mark.parametrize("make", [tensors, lambda n, *shape: factored(n, *shape, 2)])
def test_slerp_ends_at_the_models_and_keeps_a_common_length(make: Any) -> None:
    one, other = make(2, 9, 6)
    other = other.scaled(size(one) / size(other)) if isinstance(other, Factored) else other * size(one) / size(other)
    here = site([one, other])
    torch.testing.assert_close(merge(Slerp(t=0), here), dense(one))
    torch.testing.assert_close(merge(Slerp(t=1), here), dense(other))
    for t in (0.2, 0.5, 0.9):
        found = Slerp(t=t).merge(here, None)
        assert isinstance(found, Factored) == isinstance(one, Factored)
        assert size(found) == pytest.approx(size(one))
        angle = math.acos(product(one, other) / size(one) ** 2)
        assert product(one, found) / size(one) ** 2 == pytest.approx(math.cos(t * angle))


def test_slerp_scales_the_models_by_their_weights_first() -> None:
    one, other = tensors(2, 4, 4)
    torch.testing.assert_close(
        merge(Slerp(t=0.3), site([one, other], (2, -1))), merge(Slerp(t=0.3), site([2 * one, -other]))
    )


def test_slerp_of_parallel_or_absent_changes_is_linear() -> None:
    (one,) = tensors(1, 4, 4)
    torch.testing.assert_close(merge(Slerp(t=0.25), site([one, 3 * one])), 1.5 * one)
    torch.testing.assert_close(merge(Slerp(t=0.25), site([one, 0 * one])), 0.75 * one)


def test_slerp_warns_of_opposite_changes() -> None:
    (one,) = tensors(1, 4, 4)
    with pytest.warns(UserWarning, match=r"changes of q_proj are opposite \(cosine -1.0000\).*cancel"):
        found = merge(Slerp(), site([one, -one], path="q_proj"))
    assert found.abs().max() < 1e-12


def peft_layer(rslora: bool) -> tuple[Any, Any]:
    """A model of one layer with two adapters of PEFT's, and the layer."""

    def config() -> peft.LoraConfig:
        return peft.LoraConfig(r=4, lora_alpha=4, target_modules=["0"], init_lora_weights=False, use_rslora=rslora)

    torch.manual_seed(0)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(24, 32)), config(), adapter_name="one")
    model.add_adapter("two", config())
    return model, model.base_model.model[0]


def change_of(layer: Any, name: str) -> Factored:
    """The change that PEFT's layer computes with."""
    B, A = layer.lora_B[name].weight.detach(), layer.lora_A[name].weight.detach()
    return Factored(layer.scaling[name] * B, A)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_sum_is_what_peft_calls_cat_while_its_linear_has_cross_terms() -> None:
    model, layer = peft_layer(rslora=False)
    exact = merge(Sum(), site([change_of(layer, "one"), change_of(layer, "two")], (0.7, 0.3)))
    errors = {}
    for kind in ("cat", "linear", "svd"):
        model.add_weighted_adapter(["one", "two"], [0.7, 0.3], adapter_name=kind, combination_type=kind)
        errors[kind] = error(layer.get_delta_weight(kind).detach(), exact)
    assert errors["cat"] < 1e-6
    # A and B are each summed with the roots of the weights, which adds products of one model's B and the other's A.
    assert errors["linear"] > 0.5
    # Cut to the rank of one model, without a word of what is lost.
    assert errors["svd"] > 0.1


def test_rank_stabilized_adapters_merge_exactly_while_peft_scales_them_by_the_root_of_the_rank() -> None:
    model, layer = peft_layer(rslora=True)
    own = change_of(layer, "one")
    torch.testing.assert_close(merge(Sum(), site([own])), own.dense())
    both = merge(Sum(), site([own, change_of(layer, "two")]))
    for kind in ("cat", "linear"):
        model.add_weighted_adapter(["one"], [1.0], adapter_name=f"{kind} of one", combination_type=kind)
        torch.testing.assert_close(layer.get_delta_weight(f"{kind} of one").detach(), 4**0.5 * own.dense())
    model.add_weighted_adapter(["one", "two"], [1.0, 1.0], adapter_name="cat", combination_type="cat")
    torch.testing.assert_close(layer.get_delta_weight("cat").detach(), 8**0.5 * both)
