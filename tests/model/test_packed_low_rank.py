"""Methods beside LoRA on packed layers: those that run beside the layer never ask for its weight, BAT has to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import isotune
from isotune.errors import OptionError
from packed import NibbleLinear, pack, unpack
from support import adapted, assert_same_output, output, stories

BESIDE = {
    "miss": isotune.method("miss", rank=6),
    "miss mini": isotune.method("miss", rank=6, mini=4),
    "vera": isotune.method("vera", rank=6),
    "randlora": isotune.method("randlora", rank=20),
    "ia3 out": isotune.method("ia3"),
    "ia3 in": isotune.method("ia3", side="in"),
}


def dense_twin() -> nn.Module:
    """The small Llama with the weights that its packed layers stand for."""
    dense = stories()
    for path, module in pack(stories(), NibbleLinear).named_modules():
        if isinstance(module, NibbleLinear):
            dense.get_submodule(path).weight.data.copy_(unpack(module))
    return dense


@pytest.mark.parametrize("method", BESIDE)
def test_packed_layer_computes_what_its_dense_twin_computes(method: str, tmp_path: Path) -> None:
    packed, dense = (
        adapted(model, BESIDE[method], "all-linear", size=0.02)
        for model in (pack(stories(), NibbleLinear), dense_twin())
    )
    assert_same_output(output(packed), output(dense))
    isotune.save(packed, tmp_path)
    assert torch.equal(output(isotune.load(pack(stories(), NibbleLinear), tmp_path).eval()), output(packed))


def test_bat_runs_where_the_weight_can_be_had_and_is_refused_before_training_where_it_cannot() -> None:
    method = isotune.method("bat", rank=4)
    model = pack(stories(), "torchao")
    start = output(model)
    assert not torch.allclose(output(adapted(model, method, ["q_proj"], size=0.05)), start, atol=1e-3)
    with pytest.raises(OptionError, match="packed in a way that is not known; use the method miss"):
        isotune.adapt(pack(stories(), NibbleLinear), method, ["q_proj"])
