"""What is particular to BOFT: its factors, the sizes that fit, PEFT's form with and without its extension."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.boft import layer as peft_boft
from torch import Tensor, nn

import isotune
from isotune.adapters.orthogonal.boft import BOFT
from isotune.adapters.orthogonal.oft import OFT
from isotune.errors import OptionError
from isotune.sites import require_site
from support import adapted, assert_same_output, minilm, move, output, stories

LLAMA = ["q_proj", "o_proj", "gate_proj"]


def build(settings: BOFT | OFT, layer: nn.Module, size: float = 0.3) -> Any:
    """An adapter for the layer, off its start."""
    adapter = settings.build(require_site(layer, ""), torch.Generator()).double()
    return move(adapter, size=size)


def linear(n_in: int = 24, n_out: int = 9) -> nn.Linear:
    return nn.Linear(n_in, n_out).double().requires_grad_(False)


def test_one_factor_without_scale_is_oft() -> None:
    layer = linear()
    ours, oft = build(BOFT(block=6, factors=1, magnitude=False), layer), build(OFT(block=6), layer)
    oft.Q.data = ours.Q.data[0]
    torch.testing.assert_close(ours.weight(layer.weight), oft.weight(layer.weight))


@given(st.integers(1, 3), st.integers(0, 99))
def test_rotation_keeps_norms_and_angles_of_the_rows_and_the_scale_their_directions(m: int, seed: int) -> None:
    torch.manual_seed(seed)
    layer = linear()
    W = layer.weight.detach()
    plain, scaled = (build(BOFT(block=2, factors=m, magnitude=magnitude), layer) for magnitude in (False, True))
    rotated = plain.weight(W).detach()
    torch.testing.assert_close(rotated @ rotated.mT, W @ W.mT)
    assert (rotated - W).norm() > 0.1
    got = scaled.weight(W).detach()
    torch.testing.assert_close(got.norm(dim=1), (scaled.s.abs() * W.norm(dim=1)).detach())


def test_all_factors_make_the_rotation_dense_and_one_keeps_it_in_blocks() -> None:
    layer, eye = linear(16, 16), torch.eye(16, dtype=torch.float64)
    filled = [
        int((build(BOFT(block=2, factors=m, magnitude=False), layer).weight(eye).abs() > 1e-9).sum())
        for m in (1, 2, 4)
    ]
    assert filled == [16 * 2, 16 * 4, 16 * 16]


@pytest.mark.parametrize(
    ("options", "d", "sizes"),
    [({}, 384, (8, 2)), ({}, 24, (6, 2)), ({}, 7, (7, 1)), ({"factors": 3}, 24, (6, 3)), ({"block": 3}, 24, (3, 1)),
     ({"blocks": 4}, 24, (6, 2)), ({"block": 4, "factors": 1}, 20, (4, 1))],
)  # fmt: skip
def test_sizes_that_were_not_given_are_those_that_fit(
    options: dict[str, Any], d: int, sizes: tuple[int, int]
) -> None:
    assert BOFT(**options).sizes(d) == sizes


@pytest.mark.parametrize(
    ("options", "said"),
    [({"block": 5}, "block=5 does not fit the 24"), ({"factors": 4}, "factors=4 does not fit the 24"),
     ({"block": 3, "factors": 2}, "block=3, factors=2 does not fit"), ({"blocks": 3, "factors": 2}, "blocks=3")],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=rf"{said}.*divide them"):
        BOFT(**options).sizes(24)
    with pytest.raises(OptionError, match="were both given"):
        BOFT(block=4, blocks=6)


def test_dropout_makes_a_share_of_all_blocks_the_identity_in_training() -> None:
    layer, x = linear(), torch.randn(4, 24, dtype=torch.float64)
    adapter = build(BOFT(block=4, factors=2, dropout=0.99, magnitude=False), layer)
    site = require_site(layer, "")
    changed = (adapter.train()(x, site) - layer(x)).abs().max()
    # One of twelve blocks is left, so some rows change, but not as they do in evaluation.
    assert changed > 0
    assert not torch.allclose(adapter(x, site), adapter.eval()(x, site))


class Extension:
    """What PEFT's CUDA extension computes, for the processor."""

    def forward(self, blocks: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]

    def backward(self, grad: Tensor, blocks: Tensor) -> list[Tensor]:
        D, b = blocks.shape[1:3]
        return [torch.stack([grad[:, k * b : k * b + b, k * b : k * b + b] for k in range(D)], dim=1)]


@pytest.fixture(params=[True, False], ids=["with extension", "without"])
def extension(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """PEFT with its CUDA extension, or without it as on any machine that has no compiler for it."""
    found = Extension() if request.param else None
    monkeypatch.setattr(peft_boft, "get_fbd_cuda", lambda: found)
    return request.param


def peft_load(model: nn.Module, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, folder).eval()


def peft_adapt(model: nn.Module, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return move(peft.get_peft_model(model, peft.BOFTConfig(**options)))


OPTIONS = {
    "default": {},
    "one factor": {"block": 4, "factors": 1},
    "two": {"block": 4, "factors": 2},
    "three": {"block": 4, "factors": 3},
    "number": {"blocks": 16, "factors": 2},
    "without scale": {"block": 8, "factors": 2, "magnitude": False},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_peft_computes_the_same_from_what_isotune_saves_or_refuses_it_without_its_extension(
    options: str, extension: bool, tmp_path: Path
) -> None:
    model = adapted(stories(), BOFT(**OPTIONS[options]), LLAMA)
    isotune.save(model, tmp_path)
    assert torch.equal(output(isotune.load(stories(), tmp_path).eval()), output(model))
    if extension or OPTIONS[options].get("factors") == 1:
        assert_same_output(output(peft_load(stories(), tmp_path)), output(model))
        assert not torch.allclose(output(model), output(stories()), atol=1e-3)
    else:
        with pytest.raises(RuntimeError, match=r"size mismatch for .*boft_R"):
            peft_load(stories(), tmp_path)


CONFIGS = {
    "one factor": {"boft_block_size": 4},
    "two": {"boft_block_size": 4, "boft_n_butterfly_factor": 2},
    "number": {"boft_block_size": 0, "boft_block_num": 16, "boft_n_butterfly_factor": 3},
}


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize(("base", "targets"), [(minilm, ["query", "value"]), (stories, LLAMA)])
@pytest.mark.parametrize("config", CONFIGS)
def test_isotune_computes_the_same_from_what_peft_saves(
    base: Any, targets: list[str], config: str, tmp_path: Path
) -> None:
    theirs = peft_adapt(base(), target_modules=targets, **CONFIGS[config])
    theirs.save_pretrained(tmp_path)
    loaded = isotune.load(base(), tmp_path).eval()
    assert_same_output(output(loaded), output(theirs))


def test_peft_without_its_extension_trains_one_factor_whatever_its_config_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(peft_boft, "get_fbd_cuda", lambda: None)
    theirs = peft_adapt(stories(), target_modules=["q_proj"], boft_n_butterfly_factor=2)
    assert theirs.peft_config["default"].boft_n_butterfly_factor == 2
    assert theirs.base_model.model.model.layers[0].self_attn.q_proj.boft_R["default"].shape[0] == 1
    theirs.save_pretrained(tmp_path)
    loaded = isotune.load(stories(), tmp_path).eval()
    assert loaded.model.layers[0].self_attn.q_proj.isotune["default"].Q.shape[0] == 2
    assert_same_output(output(loaded), output(theirs))


def convolutions(**options: Any) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(4, 6, 3, **options)).eval()


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"bias": False}], ids=str)
def test_convolutions_go_both_ways(options: dict[str, Any], extension: bool, tmp_path: Path) -> None:
    x = torch.randn(2, 4, 7, 7)
    model = adapted(convolutions(**options), BOFT(block=2, factors=2 if extension else 1), ["0"])
    isotune.save(model, tmp_path / "ours")
    theirs = peft_load(convolutions(**options), tmp_path / "ours")
    assert_same_output(theirs(x), model(x))
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_output(isotune.load(convolutions(**options), tmp_path / "theirs")(x), model(x))


@pytest.mark.parametrize("options", [{"dilation": 2}, {"stride": (1, 2)}, {"groups": 2}], ids=str)
def test_convolutions_that_peft_computes_otherwise_are_saved_as_isotunes_own(
    options: dict[str, Any], tmp_path: Path
) -> None:
    model = adapted(convolutions(**options), BOFT(block=2), ["0"])
    isotune.save(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "ISOTUNE_BOFT"
    x = torch.randn(2, 4, 7, 7)
    assert torch.equal(isotune.load(convolutions(**options), tmp_path)(x), model(x))


def test_sizes_that_differ_by_layer_are_saved_as_isotunes_own(tmp_path: Path) -> None:
    # The input of down_proj has 172 = 4 * 43 numbers, which blocks of 8 in two factors do not fit.
    isotune.save(adapted(stories(), BOFT(), ["q_proj", "down_proj"]), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "ISOTUNE_BOFT"
    assert "has blocks of 2 and factors=2, because its width allows no others" in (tmp_path / "README.md").read_text()
