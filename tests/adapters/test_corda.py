"""What is particular to CorDA: its start from a covariance, and what PEFT makes of the same data."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.lora.config import CordaConfig
from torch import Tensor, nn

import isotune
from isotune.adapters.spectral.corda import CorDA
from isotune.adapters.spectral.pissa import PiSSA
from isotune.sites import require_site
from laws.layers import drawn_layer
from spectral import build, linear, peft_adapt, peft_save, started
from support import adapted, minilm, stories


def covariance(n_in: int = 12, rows: int = 100, seed: int = 0) -> Tensor:
    """That of rows whose features are of very different sizes and mixed."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(rows, n_in, generator=generator) * torch.logspace(-1, 1, n_in)
    X = X @ torch.linalg.qr(torch.randn(n_in, n_in, generator=generator))[0]
    return X.T @ X / rows


def calibrated(C: Tensor, layer: nn.Module, **options: Any) -> Any:
    adapter = build(CorDA(**options), layer)
    adapter.calibrate(require_site(layer, ""), C)
    return adapter


@pytest.fixture
def preprocess_corda(monkeypatch: pytest.MonkeyPatch) -> Any:
    """PEFT's measuring; it imports the package attrs, on which it does not depend, for one decorator."""
    if importlib.util.find_spec("attr") is None:
        monkeypatch.setitem(sys.modules, "attr", SimpleNamespace(dataclass=dataclasses.dataclass))
    return importlib.import_module("peft.tuners.lora.corda").preprocess_corda


@given(drawn_layer("linear"), st.integers(1, 3), st.booleans())
def test_before_it_is_calibrated_it_starts_as_pissa_and_so_does_white_data(
    layer: nn.Linear, rank: int, measured: bool
) -> None:
    rank = min(rank, *layer.weight.shape)
    adapter = build(CorDA(rank=rank), layer)
    if measured:
        adapter.calibrate(require_site(layer, ""), 7 * torch.eye(layer.in_features))
    expected = build(PiSSA(rank=rank), layer)
    torch.testing.assert_close(started(adapter), started(expected), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{}, {"alpha": 12.0}, {"alpha": 12.0, "rslora": True}, {"sigma_fuse": "U"}, {"sigma_fuse": "V"}],
    ids=str,
)
def test_the_largest_and_the_smallest_components_make_up_w(options: dict[str, Any]) -> None:
    layer, C = linear(), covariance()
    largest = calibrated(C, layer, rank=4, **options)
    smallest = calibrated(C, layer, rank=5, mode="kpm", **options)
    torch.testing.assert_close(started(largest) + started(smallest), layer.weight, rtol=0, atol=1e-4)
    # The data sees the largest ones much more than the smallest.
    seen = [torch.trace(P @ C.double() @ P.T) for P in (started(largest), started(smallest))]
    assert seen[0] > 20 * seen[1]


def test_more_of_what_the_layer_answers_on_the_data_is_trained_than_with_pissa() -> None:
    layer, C = linear(), covariance().double()
    lost = {}
    for name, adapter in {"corda": calibrated(C, layer, rank=3), "pissa": build(PiSSA(rank=3), layer)}.items():
        rest = layer.weight - started(adapter)
        lost[name] = float(torch.trace(rest @ C @ rest.T))
    assert lost["corda"] < 0.3 * lost["pissa"]


def test_the_scale_of_the_covariance_does_not_matter_and_a_singular_one_does_no_harm() -> None:
    layer, C = linear(), covariance(rows=3)
    one, other = (started(calibrated(C * scale, layer, rank=3)) for scale in (1.0, 1e6))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-3)
    dead = C.clone()
    dead[:, 2], dead[2] = 0, 0
    assert started(calibrated(dead, layer, rank=3)).isfinite().all()


def test_singular_values_go_to_the_side_that_is_asked_for() -> None:
    layer, C = linear(), covariance()
    sides = {fuse: calibrated(C, layer, rank=3, sigma_fuse=fuse) for fuse in ("UV", "U", "V")}
    for adapter in sides.values():
        torch.testing.assert_close(started(adapter), started(sides["UV"]), rtol=0, atol=1e-4)
    torch.testing.assert_close(sides["V"].B0.norm(dim=0), torch.ones(3).double(), rtol=0, atol=1e-5)
    ratio = sides["U"].B0.norm(dim=0) / sides["UV"].B0.norm(dim=0)
    torch.testing.assert_close(sides["UV"].B0.norm(dim=0), ratio, rtol=1e-4, atol=0)


def test_calibrating_what_has_been_trained_is_refused_and_changes_nothing() -> None:
    layer = linear()
    adapter = build(CorDA(rank=3), layer)
    adapter.A.data[0, 0] += 1
    before = adapter.A.clone()
    assert not adapter.wants_covariance
    with pytest.raises(isotune.IsotuneError, match="has been trained, and calibrating it would start it anew"):
        adapter.calibrate(require_site(layer, ""), covariance())
    assert torch.equal(adapter.A, before)


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_peft_comes_to_the_same_start_from_the_same_covariance(mode: Any, preprocess_corda: Any) -> None:
    X = torch.randn(200, 12) * torch.logspace(-1, 1, 12)
    model = nn.Sequential(nn.Linear(12, 9))
    W = model[0].weight.detach().clone()
    corda = CordaConfig(corda_method=mode)
    config = peft.LoraConfig(r=3, lora_alpha=5, init_lora_weights="corda", corda_config=corda, target_modules=["0"])
    preprocess_corda(model, config, run_model=lambda: model(X))
    theirs = peft.get_peft_model(model, config).base_model.model[0]
    trained = 5 / 3 * theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
    layer = nn.Linear(12, 9)
    layer.weight.data = W
    ours = calibrated(X.T @ X / len(X), layer, rank=3, alpha=5, mode=mode)
    torch.testing.assert_close(started(ours), trained.detach(), rtol=0, atol=1e-4)
    torch.testing.assert_close(theirs.base_layer.weight.detach(), W - started(ours), rtol=0, atol=1e-4)


def test_a_folder_of_pefts_corda_lacks_its_start_and_is_refused_as_peft_refuses_it(
    tmp_path: Path, preprocess_corda: Any
) -> None:
    config = peft.LoraConfig(r=3, init_lora_weights="corda", corda_config=CordaConfig(), target_modules=["query"])
    model = minilm()
    ids = torch.arange(100, 500).view(4, 100)
    preprocess_corda(model, config, run_model=lambda: [model(input_ids=row[None]) for row in ids])
    folder = peft_save(peft_adapt(model, config), tmp_path)
    with pytest.raises(ValueError, match="preprocess_corda"):
        peft.PeftModel.from_pretrained(minilm(), folder)
    with pytest.raises(isotune.IsotuneError, match="path_initial_model_for_weight_conversion"):
        isotune.load(minilm(), folder)


def test_a_calibrated_adapter_comes_back_from_disk_as_it_was(tmp_path: Path) -> None:
    model = isotune.adapt(stories(), CorDA(rank=3), ["q_proj"], seed=0)
    isotune.calibrate(model, [torch.arange(400).view(4, 100)])
    layer = model.model.layers[0].self_attn.q_proj
    isotune.save(model, tmp_path)
    loaded = isotune.load(stories(), tmp_path).model.layers[0].self_attn.q_proj
    for name in ("A", "B", "A0", "B0"):
        assert torch.equal(getattr(loaded.isotune["default"], name), getattr(layer.isotune["default"], name))
    fresh = adapted(stories(), CorDA(rank=3), ["q_proj"], size=0).model.layers[0].self_attn.q_proj
    assert not torch.allclose(started(fresh.isotune["default"]), started(layer.isotune["default"]), atol=1e-2)
