"""What is particular to RoAd: its pairs, its variants, the rotated bias; both directions with PEFT."""

from __future__ import annotations

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

import isotune
from checkpoint.test_peft import peft_adapt, peft_load
from isotune.errors import OptionError
from isotune.sites import require_site
from support import adapted, assert_same_output, minilm, output, stories

VARIANTS = pytest.mark.parametrize("variant", [1, 2, 4])


def build(layer: nn.Module, size: float = 0.5, **options: Any) -> Any:
    """An adapter for the layer, in double precision, `size` off its start."""
    adapter = isotune.method("road", **options).build(require_site(layer, ""), torch.Generator()).double()
    for parameter in adapter.parameters():
        parameter.data += size * torch.randn_like(parameter)
    return adapter


def test_variant_1_rotates_and_scales_each_pair() -> None:
    layer = nn.Linear(5, 8).double().requires_grad_(False)
    adapter = build(layer, size=0.0, group_size=4)
    adapter.theta.data[3], adapter.alpha.data[3] = math.pi / 2, 3.0  # the second pair of the second group: 5 and 7
    x = torch.randn(6, 5, dtype=torch.float64)
    y, got = layer(x), adapter(x, require_site(layer, "")).detach()
    expected = y.clone()
    expected[:, 5], expected[:, 7] = -3 * y[:, 7], 3 * y[:, 5]
    torch.testing.assert_close(got, expected)


@VARIANTS
@pytest.mark.parametrize("group_size", [2, 4, 12])
def test_matrix_has_two_entries_in_each_row_at_the_pair(variant: int, group_size: int) -> None:
    R = build(nn.Linear(5, 12), variant=variant, group_size=group_size).weight(torch.eye(12).double()).detach()
    half = group_size // 2
    pairs = [(i, i + half) for start in range(0, 12, group_size) for i in range(start, start + half)]
    expected = torch.zeros_like(R)
    for i, j in pairs:
        expected[[i, i, j, j], [i, j, i, j]] = R[[i, i, j, j], [i, j, i, j]]
        block = R[[i, j]][:, [i, j]]
        free = (block[0, 0] - block[1, 1]).abs() + (block[0, 1] + block[1, 0]).abs()
        assert (free < 1e-12) == (variant == 1)  # a rotation times a scale
    assert torch.equal(R, expected)
    assert (R != 0).sum() == 24


@VARIANTS
def test_folding_rotates_the_bias_as_well(variant: int) -> None:
    model = nn.Sequential(nn.Linear(5, 8))
    bias = model[0].bias.detach().clone()
    adapted(model, isotune.method("road", variant=variant), ["0"], size=0.5)
    adapter = model[0].isotune["default"]
    x = torch.randn(3, 5)
    before = model(x).detach()
    folded = isotune.fold(model, keep_base=False)
    torch.testing.assert_close(folded(x), before)
    torch.testing.assert_close(folded[0].bias.detach(), adapter.weight(torch.eye(8)).detach() @ bias)


def test_pairs_within_the_groups_of_a_convolution_are_rotated_and_others_refused() -> None:
    layer = nn.Conv2d(4, 8, 3, groups=2).double().requires_grad_(False)
    adapter = build(layer, group_size=4)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    R = adapter.weight(torch.eye(8).double())
    torch.testing.assert_close(adapter(x, require_site(layer, "")), torch.einsum("ij,bjhw->bihw", R, layer(x)))
    with pytest.raises(OptionError, match=r"group_size=8 does not divide the 4 outputs of each of its 2 groups; use"):
        build(layer, group_size=8)


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_output_rotation_on_top_leaves_the_rotated_bias_alone(kind: str) -> None:
    layer = nn.Linear(6, 8) if kind == "linear" else nn.Conv2d(6, 8, 3)
    model = nn.Sequential(layer).double()
    x = torch.randn(2, 6, 6, 6, dtype=torch.float64)
    adapted(model, isotune.method("road"), ["0"], size=0.5, name="below")
    adapted(model, isotune.method("hra", rank=2, side="out"), ["0"], size=0.5, name="above")
    isotune.use(model, "below", "above")
    below, above = (model[0].isotune[name] for name in ("below", "above"))
    site = require_site(layer, "")
    dense = site.forward_with(x, above.weight(below.weight(site.weight)), below.bias(site.bias))
    torch.testing.assert_close(model(x), dense)


def test_outputs_that_form_no_pairs_are_refused() -> None:
    with pytest.raises(OptionError, match=r"group_size=64 does not divide the 96 outputs.*use group_size=2"):
        build(nn.Linear(4, 96), group_size=64)
    with pytest.raises(OptionError, match="an odd number has no pairs"):
        build(nn.Linear(4, 7))
    with pytest.raises(OptionError, match="multiple of 2"):
        isotune.method("road", group_size=3)
    with pytest.raises(OptionError, match="variant=3"):
        isotune.method("road", variant=3)


@profile(max_examples=6)
@given(st.sampled_from([1, 2, 4]), st.sampled_from([2, 4, 32]), st.integers(0, 99))
def test_llama_goes_both_ways_with_peft(
    tmp_path_factory: pytest.TempPathFactory, variant: int, group_size: int, seed: int
) -> None:
    folder, targets = tmp_path_factory.mktemp("road"), ["q_proj", "v_proj"]
    model = adapted(stories(), isotune.method("road", variant=variant, group_size=group_size), targets, seed=seed)
    isotune.save(model, folder / "ours")
    assert_same_output(output(peft_load(stories(), folder / "ours")), output(model))
    config = peft.RoadConfig(variant=f"road_{variant}", group_size=group_size, target_modules=targets)
    theirs = peft_adapt(stories(), config, seed)
    theirs.save_pretrained(folder / "theirs")
    loaded = isotune.load(stories(), folder / "theirs").eval()
    assert_same_output(output(loaded), output(theirs))
    assert not torch.allclose(output(loaded), output(stories()), atol=1e-3)
    isotune.save(loaded, folder / "again")
    assert_same_output(output(peft_load(stories(), folder / "again")), output(theirs))


@VARIANTS
def test_layers_with_a_bias_go_both_ways_with_peft_and_merge_to_the_same(variant: int, tmp_path: Path) -> None:
    theirs = peft_adapt(minilm(), peft.RoadConfig(variant=f"road_{variant}", target_modules=["query", "dense"]))
    theirs.save_pretrained(tmp_path / "theirs")
    model = isotune.load(minilm(), tmp_path / "theirs").eval()
    assert_same_output(output(model), output(theirs))
    isotune.save(model, tmp_path / "ours")
    assert_same_output(output(peft_load(minilm(), tmp_path / "ours")), output(model))
    assert_same_output(output(isotune.fold(model)), output(theirs.merge_and_unload()))


@pytest.mark.parametrize("case", ["mixed", "convolution"])
def test_what_peft_cannot_express_is_saved_as_isotunes_own(case: str, tmp_path: Path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(1)
        return (
            nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)) if case == "mixed" else nn.Sequential(nn.Conv2d(2, 4, 3))
        )

    if case == "mixed":
        model = adapted(base(), isotune.method("road"), ["0", "1"], overrides={"1": {"variant": 2}})
        x, why = torch.randn(3, 8), "one variant and one group size for all layers"
    else:
        model = adapted(base(), isotune.method("road"), ["0"])
        x, why = torch.randn(1, 2, 5, 5), "of the kind conv2d, which PEFT's RoAd does not adapt"
    isotune.save(model, tmp_path)
    assert why in (tmp_path / "README.md").read_text()
    assert torch.equal(isotune.load(base(), tmp_path)(x), model(x))
