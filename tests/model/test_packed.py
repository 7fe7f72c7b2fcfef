"""Adapters on layers whose weight is quantised or packed: the forward pass never asks for it."""

from __future__ import annotations

import copy
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import isotune
from isotune import HRA, IsotuneError, LoRA, Settings
from isotune.diagnostics import diagnose
from isotune.sites import require_site
from packed import NibbleLinear, SecretLinear, pack, unpack
from support import STORIES, adapted, assert_same_output, output, stories, tokens

KINDS = {"torchao": "torchao", "packed": NibbleLinear, "secret": SecretLinear}
METHODS = [HRA(rank=4), HRA(rank=3, strict=True), HRA(rank=4, side="out"), LoRA(rank=4)]
on_every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
named = pytest.mark.parametrize("method", METHODS, ids=["hra", "hra strict", "hra out", "lora"])


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Every stored number of the base, what is inside torchao's tensors included."""
    found = {}
    for name, tensor in model.state_dict().items():
        inner = {key: getattr(tensor, key) for key in ("qdata", "scale") if hasattr(tensor, key)}
        found |= {f"{name}.{key}": t.clone() for key, t in (inner or {"": tensor}).items()}
    return found


def train(model: nn.Module, steps: int = 4) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch = tokens(model)
    losses = []
    for _ in range(steps):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@on_every_kind
@named
def test_packed_base_trains_saves_loads_and_keeps_its_bits(kind: Any, method: Settings, tmp_path: Path) -> None:
    model = pack(stories(), kind)
    before, start = bits(model), output(model)
    isotune.adapt(model, method, "all-linear", seed=0)
    assert_same_output(output(model), start)
    losses = train(model)
    assert losses[-1] < losses[0]
    trained = output(model)
    isotune.save(model, tmp_path)
    loaded = isotune.load(pack(stories(), kind), tmp_path)
    assert torch.equal(output(loaded), trained)
    assert torch.equal(output(copy.deepcopy(model)), trained)
    if kind != "torchao":  # whose layers cannot be pickled, without adapters either
        assert torch.equal(output(pickle.loads(pickle.dumps(model))), trained)
    isotune.remove(model)
    after = bits(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(output(model), start)


@named
def test_packed_layer_computes_what_its_dense_twin_computes_with_the_same_gradients(method: Settings) -> None:
    dense, packed = stories(), pack(stories(), NibbleLinear)
    with torch.no_grad():
        for path, module in packed.named_modules():
            if isinstance(module, NibbleLinear):
                dense.get_submodule(path).weight.copy_(unpack(module))
    grads = []
    for model in (dense, packed):
        adapted(model, method, "all-linear")
        model(**tokens(model)).logits.square().mean().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert_same_output(output(packed), output(dense))
    for got, expected in zip(*grads, strict=True):
        assert_same_output(got, expected, 1e-4)


def test_adapters_are_fp32_whatever_the_packed_weight_is_made_of() -> None:
    model = adapted(pack(stories(), NibbleLinear), HRA(rank=4))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@on_every_kind
def test_shapes_and_counts_are_those_of_the_dense_layer(kind: Any, tmp_path: Path) -> None:
    plain, model = adapted(stories(), HRA(rank=4)), adapted(pack(stories(), kind), HRA(rank=4))
    assert [r.trainable for r in isotune.describe(model)] == [r.trainable for r in isotune.describe(plain)]
    for got, expected in zip(isotune.describe(model), isotune.describe(plain), strict=True):
        assert got.share == pytest.approx(expected.share, rel=1e-6)
    isotune.save(model, tmp_path)
    # What was learnt on the packed base goes on the dense one, too.
    assert_same_output(output(isotune.load(stories(), tmp_path)), output(model), 0.3)
    rows = diagnose(tmp_path, STORIES).sites
    assert {(row.in_features, row.out_features) for row in rows} == {(64, 64), (64, 32)}
    assert all(row.change_rank == 4 for row in rows)


def test_torchao_layer_is_exported_from_its_dequantised_weight(tmp_path: Path) -> None:
    for method in (HRA(rank=4), LoRA(rank=4)):
        model = adapted(pack(stories(), "torchao"), method, "all-linear")
        exported = isotune.export_lora(model, tmp_path / method.name)
        assert exported.residual < 1e-5
        served = isotune.load(pack(stories(), "torchao"), tmp_path / method.name)
        assert_same_output(output(served), output(model), 1e-4)
        weight = model.model.layers[0].mlp.up_proj.weight
        assert type(weight) is Tensor
        assert weight.dtype == torch.float32


def test_layer_that_cannot_be_dequantised_is_named_when_its_weight_is_needed(tmp_path: Path) -> None:
    model = adapted(pack(stories(), NibbleLinear), HRA(rank=4))
    with pytest.raises(IsotuneError, match=r"layers\.0\.self_attn\.q_proj.*NibbleLinear \(64 -> 64\) is packed.*unq"):
        isotune.export_lora(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


@on_every_kind
def test_fold_of_a_packed_weight_is_refused_and_changes_nothing(kind: Any) -> None:
    model = adapted(pack(stories(), kind), HRA(rank=4))
    # One dense layer beside the packed ones, which comes first in the model.
    adapted(model, LoRA(rank=2), ["embed_tokens"], name="embedding")
    isotune.use(model, "default", "embedding")
    before = output(model)
    with pytest.raises(IsotuneError, match=r"q_proj.*cannot hold the adapted one exactly"):
        isotune.fold(model)
    assert torch.equal(output(model), before)
    isotune.fold(isotune.use(model, "embedding"))


def test_bitsandbytes_weight_is_dequantised_by_its_own_library(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = NibbleLinear(nn.Linear(8, 4))
    layer.weight.quant_state = "state"
    functional = types.ModuleType("bitsandbytes.functional")
    functional.dequantize_4bit = lambda weight, state: (unpack(layer), state)[0]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", functional)
    assert torch.equal(require_site(layer, "").weight, unpack(layer))


def test_weight_in_eight_bit_floats_counts_as_packed() -> None:
    layer = nn.Linear(8, 4)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    site = require_site(layer, "")
    assert site.packed
    assert (site.in_features, site.out_features, site.shape) == (8, 4, (4, 8))
    with pytest.raises(IsotuneError, match="no known way to dequantise"):
        _ = site.weight


def test_stacked_adapters_over_a_packed_base_learn() -> None:
    model = adapted(pack(stories(), SecretLinear), HRA(rank=4), name="one")
    adapted(model, LoRA(rank=2), name="two")
    isotune.use(model, "one", "two")
    losses = train(model)
    assert losses[-1] < losses[0]


def test_compiled_packed_layers_equal_the_eager_ones() -> None:
    layer = nn.Sequential(NibbleLinear(nn.Linear(16, 8)), SecretLinear(nn.Linear(8, 8)))
    adapted(layer, HRA(rank=4), ["0", "1"])
    x = torch.randn(3, 16)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_same_output(compiled(x), layer(x))


def test_adapter_trained_on_a_quantised_base_fits_the_unquantised_one(tmp_path: Path) -> None:
    model = pack(stories(), NibbleLinear)
    model.config.quantization_config = {"quant_method": "nibbles"}
    isotune.save(adapted(model, LoRA(rank=2)), tmp_path)
    isotune.load(stories(), tmp_path)
