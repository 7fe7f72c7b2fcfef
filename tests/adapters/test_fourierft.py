"""What is particular to FourierFT: PEFT's frequencies, its start, its two forms, and both directions with PEFT."""

from __future__ import annotations

import copy
import json
import math
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
from isotune import Settings
from isotune.errors import OptionError
from isotune.sites import require_site
from support import adapted, assert_same_output, minilm, move, output, stories

TARGETS = {minilm: ["query", "dense"], stories: ["q_proj", "k_proj", "down_proj"]}
on_both_models = pytest.mark.parametrize("base", TARGETS, ids=lambda base: base.__name__)


def fourierft(**options: Any) -> Settings:
    return isotune.method("fourierft", **options)


def build(settings: Settings, layer: nn.Module, seed: int = 0) -> Any:
    adapter = settings.build(require_site(layer, "layer"), torch.Generator().manual_seed(seed))
    adapter.spectrum.data.normal_(generator=torch.Generator().manual_seed(seed))
    return adapter.to(layer.weight.dtype)


def peft_adapt(model: nn.Module, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return move(peft.get_peft_model(model, peft.FourierFTConfig(**options)), seed, size=1.0)


def peft_load(model: nn.Module, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(model, folder).eval()


def test_change_is_the_sum_of_plane_waves() -> None:
    layer = nn.Linear(6, 5).double()
    adapter = build(fourierft(n_frequency=4, scale=3.0), layer)
    i, j = torch.arange(5).double()[:, None], torch.arange(6).double()
    expected = torch.zeros(5, 6, dtype=torch.float64)
    for p, q, c in zip(*adapter.entries(), strict=True):
        expected += 3.0 / 30 * c.detach() * torch.cos(2 * math.pi * (p * i / 5 + q * j / 6))
    torch.testing.assert_close(adapter.weight(layer.weight).detach(), layer.weight + expected)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_rows_and_weight_have_the_same_change_and_gradients(n_in: int, n_out: int, seed: int) -> None:
    layer = nn.Linear(n_in, n_out).double()
    adapter = build(fourierft(n_frequency=1 + seed % (n_in * n_out)), layer, seed)
    x = torch.randn(7, n_in, dtype=torch.float64, requires_grad=True)
    rows, dense = adapter.change_of(x, n_out), x @ adapter.dense_change((n_out, n_in)).mT
    torch.testing.assert_close(rows, dense, rtol=0, atol=1e-10)
    inputs, g = (x, adapter.spectrum), torch.randn_like(rows)
    for got, expected in zip(
        torch.autograd.grad(rows, inputs, g), torch.autograd.grad(dense, inputs, g), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("rows", "through_rows"), [(4, True), (20000, False)])
def test_few_rows_are_transformed_and_many_go_through_the_weight(
    rows: int, through_rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = nn.Linear(64, 64).requires_grad_(False)
    adapter = build(fourierft(n_frequency=50), layer)
    used = []
    original = type(adapter).change_of
    monkeypatch.setattr(type(adapter), "change_of", lambda *args: used.append(1) or original(*args))
    x = torch.randn(rows, 64)
    torch.testing.assert_close(
        adapter(x, require_site(layer, "")),
        nn.functional.linear(x, adapter.weight(layer.weight), layer.bias),
        rtol=1e-4,
        atol=1e-4,
    )
    assert bool(used) == through_rows


def test_start_is_zero_unless_it_is_asked_to_be_random_and_then_seeds_decide() -> None:
    layer = nn.Linear(8, 8)
    site = require_site(layer, "")
    start = [fourierft(n_frequency=5).build(site, torch.Generator()).spectrum]
    random = fourierft(n_frequency=5, start="random")
    assert not random.identity_at_start
    start += [random.build(site, torch.Generator().manual_seed(seed)).spectrum for seed in (1, 1, 2)]
    assert (start[0] == 0).all()
    assert torch.equal(start[1], start[2])
    assert not torch.equal(start[1], start[3])


def test_every_layer_of_one_shape_has_the_frequencies_that_peft_draws() -> None:
    base = nn.Sequential(nn.Linear(48, 40), nn.Linear(40, 40), Conv1D(48, 40))
    theirs = peft_adapt(base, n_frequency=30, random_loc_seed=5, target_modules=["0", "1"])
    for index in (0, 1):
        layer = theirs.base_model.model[index]
        ours = build(fourierft(n_frequency=30, seed=5), layer.base_layer)
        assert torch.equal(torch.stack(ours.entries()[:2]), layer.indices["default"])


def test_peft_starts_from_a_changed_model_by_default_and_isotune_from_the_same() -> None:
    torch.manual_seed(0)
    options = {"n_frequency": 200, "target_modules": TARGETS[stories]}
    theirs = peft.get_peft_model(stories(), peft.FourierFTConfig(**options)).eval()
    ours = isotune.adapt(stories(), fourierft(n_frequency=200), TARGETS[stories]).eval()
    base = output(stories())
    assert not torch.allclose(output(theirs), base, atol=1e-2)
    assert torch.equal(output(ours), base)


@on_both_models
@profile(max_examples=3)
@given(st.integers(1, 900), st.sampled_from([1.0, 150.0]), st.integers(0, 99), st.booleans())
def test_isotune_and_peft_load_what_the_other_saves(
    base: Any, tmp_path_factory: pytest.TempPathFactory, n: int, scale: float, seed: int, random: bool
) -> None:
    folder = tmp_path_factory.mktemp("drawn")
    settings = fourierft(n_frequency=n, scale=scale, seed=seed, start="random" if random else "zero")
    ours = adapted(base(), settings, TARGETS[base], size=1.0, seed=seed)
    isotune.save(ours, folder / "ours")
    assert_same_output(output(peft_load(base(), folder / "ours")), output(ours))
    theirs = peft_adapt(
        base(),
        seed,
        n_frequency=n,
        scaling=scale,
        random_loc_seed=seed,
        init_weights=not random,
        target_modules=TARGETS[base],
    )
    theirs.save_pretrained(folder / "theirs")
    loaded = isotune.load(base(), folder / "theirs").eval()
    assert_same_output(output(loaded), output(theirs))
    assert not torch.allclose(output(theirs), output(base()), atol=1e-4)
    assert {row.trainable for row in isotune.describe(loaded)} == {n}


def test_gpt2_layers_go_both_ways(tmp_path: Path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(Conv1D(48, 40), nn.Tanh(), Conv1D(30, 48)).eval()

    x = torch.randn(3, 40)
    ours = adapted(base(), fourierft(n_frequency=60), ["0", "2"], size=1.0)
    isotune.save(ours, tmp_path / "ours")
    theirs = peft_load(base(), tmp_path / "ours")
    assert_same_output(theirs(x), ours(x))
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_output(isotune.load(base(), tmp_path / "theirs").eval()(x), ours(x))


def test_overrides_are_pefts_frequency_pattern(tmp_path: Path) -> None:
    overrides = {"v_proj": {"n_frequency": 70}, r".*layers\.1\..*q_proj": {"n_frequency": 20}}
    ours = adapted(stories(), fourierft(n_frequency=50), ["q_proj", "v_proj"], size=1.0, overrides=overrides)
    isotune.save(ours, tmp_path / "ours")
    theirs = peft_load(stories(), tmp_path / "ours")
    assert_same_output(output(theirs), output(ours))
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_output(output(isotune.load(stories(), tmp_path / "theirs").eval()), output(ours))


@pytest.mark.parametrize(
    ("base", "options", "overrides", "said"),
    [
        (nn.Linear(40, 40), {}, {r"1\..*": {"scale": 2.0}}, "one scaling and one seed for all layers"),
        (nn.Linear(40, 40), {}, {r"1\..*": {"n_frequency": 4}}, "would give one layer the number of another's"),
        (nn.Linear(9, 9), {"n_frequency": None}, {}, "1.0 has fewer than 1000 weights"),
        (nn.Conv2d(40, 40, 1), {}, {}, "is a convolution"),
    ],
    ids=["scale", "pattern", "small", "convolution"],
)
def test_what_peft_cannot_express_is_saved_as_isotunes_own_with_the_reason(
    base: nn.Module, options: dict[str, Any], overrides: dict[str, Any], said: str, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Linear(40, 40), nn.Sequential(base, nn.Linear(40, 40)))
    saved = adapted(
        copy.deepcopy(model), fourierft(**{"n_frequency": 6} | options), ["0", "1.1"], overrides=overrides
    )
    isotune.save(saved, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "ISOTUNE_FOURIERFT"
    assert said in (tmp_path / "README.md").read_text()
    loaded = isotune.load(model, tmp_path)
    for path in ("0", "1.0", "1.1"):
        assert torch.equal(loaded.get_submodule(path).weight, saved.get_submodule(path).weight)


def test_more_frequencies_than_weights_are_refused_and_the_default_takes_all_of_a_small_layer() -> None:
    with pytest.raises(OptionError, match=r"n_frequency=21 is larger than the layer.*5 x 4 = 20.*at most 20"):
        build(fourierft(n_frequency=21), nn.Linear(4, 5))
    assert build(fourierft(), nn.Linear(4, 5)).spectrum.shape == (20,)
    assert build(fourierft(), nn.Linear(64, 64)).spectrum.shape == (1000,)
