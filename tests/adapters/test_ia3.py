"""What is particular to (IA)³: outputs scaled with their bias, or inputs."""

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
from torch import Tensor, nn

import isotune
from both_ways import assert_isotune_loads, assert_peft_loads, by_peft, tiny_gpt2
from isotune.adapters.low_rank.ia3 import IA3
from isotune.adapters.peft.dialect import dialect_of
from isotune.bare import bare
from isotune.checkpoint.files import CONFIG
from isotune.errors import OptionError
from support import adapted, assert_same_output, minilm, output, stories

LAYERS = ["k_proj", "v_proj", "down_proj"]


def ia3(**options: Any) -> isotune.Settings:
    return isotune.method("ia3", **options)


def test_outputs_are_scaled_with_the_bias_and_inputs_without() -> None:
    layer = nn.Linear(6, 4)
    W, b = layer.weight.detach().clone(), layer.bias.detach().clone()
    x = torch.randn(5, 6)
    for side in ("out", "in"):
        model = adapted(nn.Sequential(layer), ia3(side=side), ["0"], size=0.5)
        scale = model[0].isotune["default"].l.detach()
        expected = scale * (x @ W.mT + b) if side == "out" else (scale * x) @ W.mT + b
        torch.testing.assert_close(model(x), expected)
        torch.testing.assert_close(model[0].bias, scale * b if side == "out" else b)
        isotune.remove(model)


def test_gradient_at_the_start_is_the_output_times_its_gradient() -> None:
    model = isotune.adapt(nn.Sequential(nn.Linear(6, 4)), ia3(), ["0"])
    y, g = model(torch.randn(5, 6)), torch.randn(5, 4)
    y.backward(g)
    torch.testing.assert_close(model[0].isotune["default"].l.grad, (y * g).sum(0).detach())


def test_scale_is_not_rounded_to_half_precision() -> None:
    # Next to 1.02 bfloat16 has 1.0156 and 1.0234.
    model = isotune.adapt(nn.Sequential(nn.Linear(64, 512)).bfloat16(), ia3(), ["0"])
    x = torch.randn(20, 64).bfloat16()
    before = model(x).detach().float()
    model[0].isotune["default"].l.data += 0.02
    moved = model(x).detach().float() - before
    assert float((moved * before).sum() / before.square().sum()) == pytest.approx(0.02, rel=0.05)


@profile(max_examples=4)
@given(st.sets(st.sampled_from(LAYERS)), st.integers(0, 99))
def test_any_choice_of_sides_means_the_same_in_peft(
    tmp_path_factory: pytest.TempPathFactory, inputs: set[str], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("drawn")
    overrides = {name: {"side": "in"} for name in inputs}
    assert_peft_loads(stories, ia3(), folder / "one", targets=LAYERS, overrides=overrides, seed=seed)
    config = peft.IA3Config(target_modules=LAYERS, feedforward_modules=sorted(inputs))
    model = assert_isotune_loads(stories, config, folder)
    assert (model.model.layers[0].mlp.down_proj.isotune.settings["default"].side == "in") == ("down_proj" in inputs)


def convolutions() -> nn.Module:
    torch.manual_seed(1)
    layers = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 5, 1, stride=2)
    return nn.Sequential(*layers).eval()


def images(model: nn.Module) -> Tensor:
    return model(torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(0))).detach()


def test_minilm_gpt2_and_convolutions_go_both_ways(tmp_path: Path) -> None:
    inputs = r".*(output\.dense|mlp\.c_proj)|2"
    for base, targets, run in (
        (minilm, ["key", "value", "output.dense"], output),
        (tiny_gpt2, ["c_attn", "mlp.c_proj"], output),
        (convolutions, ["0", "2"], images),
    ):
        folder = tmp_path / base.__name__
        overrides = {inputs: {"side": "in"}}
        assert_peft_loads(base, ia3(), folder / "one", run, targets=targets, overrides=overrides)
        fan = base is tiny_gpt2
        config = peft.IA3Config(target_modules=targets, feedforward_modules=inputs, fan_in_fan_out=fan)
        assert_isotune_loads(base, config, folder, run)


def test_paths_that_peft_would_take_for_others_are_saved_as_isotunes_own(tmp_path: Path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"proj": nn.Linear(4, 4), "x": nn.ModuleDict({"proj": nn.Linear(4, 4)})})

    model = adapted(base(), ia3(), ["proj"], overrides={"proj": {"side": "in"}, "x.proj": {"side": "out"}})
    isotune.save(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["peft_type"] == "ISOTUNE_IA3"
    loaded, x = isotune.load(base(), tmp_path), torch.randn(2, 4)
    assert torch.equal(loaded["x"]["proj"](x), model["x"]["proj"](x))


def test_inputs_of_a_convolution_with_a_kernel_are_refused() -> None:
    with pytest.raises(OptionError, match=r"with kernel \(3, 3\) and groups=1, cannot be scaled.*side='out'"):
        isotune.adapt(convolutions(), ia3(side="in"), ["0"])


def test_older_configs_without_feedforward_layers_scale_outputs() -> None:
    config = {"feedforward_modules": None}
    assert dialect_of(IA3).read(config, "a.b") == IA3(side="out")


def test_unfolding_restores_what_pefts_unmerging_divides_by_zero(tmp_path: Path) -> None:
    theirs = by_peft(
        nn.Sequential(nn.Linear(6, 4)), peft.IA3Config(target_modules=["0"], feedforward_modules=[]), tmp_path / "a"
    )
    theirs.base_model.model[0].ia3_l["default"].data[1] = 0
    theirs.save_pretrained(tmp_path / "a")
    base = theirs.base_model.model[0].base_layer
    model = nn.Sequential(nn.Linear(6, 4))
    model[0].load_state_dict(base.state_dict())
    W, b, x = base.weight.detach().clone(), base.bias.detach().clone(), torch.randn(3, 6)
    isotune.load(model, tmp_path / "a")
    assert_same_output(model(x), theirs(x))
    isotune.fold(model)
    assert_same_output(model(x), theirs(x))
    isotune.unfold(model)
    assert torch.equal(bare(model[0], "weight"), W)
    assert torch.equal(bare(model[0], "bias"), b)
    theirs.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerge result can be inaccurate"):
        theirs.unmerge_adapter()
    assert (base.weight[1] == 0).all()
