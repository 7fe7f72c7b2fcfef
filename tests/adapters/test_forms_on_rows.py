"""Methods that transform rows or form the weight: the laws' small layers do the second, so here is the first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import isotune
from isotune.adapters.low_rank.tlora import TLoRAAdapter
from isotune.adapters.registry import method_class
from isotune.adapters.spectral.sparse_spectrum import SparseSpectrum
from laws.options import drawn_settings
from laws.suite import check_law
from packed import NibbleLinear, SecretLinear, unpack
from support import adapted, assert_same_output

METHODS = {
    "fourierft": {"n_frequency": 80},
    "loca": {"n_frequency": 80},
    "loca learned": {"n_frequency": 80, "location_steps": 60},
    "tlora": {},
}


@pytest.mark.parametrize("kind", [NibbleLinear, SecretLinear])
@pytest.mark.parametrize("name", METHODS)
def test_packed_layer_computes_as_its_dense_twin_and_is_never_asked_for_its_weight(name: str, kind: Any) -> None:
    dense = nn.Linear(12, 16)
    packed = kind(dense)
    dense.weight.data = unpack(packed)
    # So many rows that the dense layer goes through its weight.
    x, gradients, outputs = torch.randn(3000, 12), [], []
    for layer in (dense, packed):
        method = isotune.method(name.partition(" ")[0], **METHODS[name])
        model = adapted(nn.Sequential(layer), method, ["0"], size=0.3)
        y = model(x)
        y.square().mean().backward()
        outputs.append(y)
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert_same_output(outputs[1], outputs[0])
    assert gradients[0]
    for got, expected in zip(gradients[1], gradients[0], strict=True):
        assert_same_output(got, expected, 1e-4)


@pytest.mark.parametrize(
    "law",
    [
        "identity_at_start",
        "forward_equals_reference",
        "gradients_are_derivatives",
        "dtype_is_kept",
        "compiles_without_a_break",
        "stack_is_the_product_of_its_parts",
        "fold_is_the_forward_and_unfold_restores",
        "every_factor_moves_within_two_steps",
    ],
)
@pytest.mark.parametrize("name", ["fourierft", "loca", "tlora"])
def test_laws_hold_on_rows(name: str, law: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for family in (SparseSpectrum, TLoRAAdapter):
        monkeypatch.setattr(family, "_rows_are_cheaper", lambda *_: True)
    check_law(method_class(name), "linear", law, drawn_settings(method_class(name)))
