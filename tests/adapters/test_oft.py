"""What is particular to OFT: its blocks, COFT's radius, its magnitudes, and PEFT's form of it, right and wrong."""

from __future__ import annotations

import math
import warnings
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
from isotune.adapters.orthogonal.oft import OFT
from isotune.adapters.peft.dialect import NotInPEFTError, dialect_of
from isotune.errors import IsotuneError, OptionError
from isotune.linalg.cayley import rotation
from isotune.sites import require_site
from support import adapted, assert_same_output, minilm, move, output, stories

LLAMA = ["q_proj", "o_proj", "down_proj"]


def build(settings: OFT, layer: nn.Module, size: float = 0.3) -> Any:
    """An adapter for the layer, off its start."""
    adapter = settings.build(require_site(layer, ""), torch.Generator()).double()
    return move(adapter, size=size)


def linear(n_in: int = 12, n_out: int = 9) -> nn.Linear:
    return nn.Linear(n_in, n_out).double().requires_grad_(False)


@pytest.mark.parametrize("share", [False, True])
def test_weight_is_w_times_the_transposed_block_diagonal_rotation(share: bool) -> None:
    layer = linear()
    adapter = build(OFT(block=4, share=share), layer)
    R = torch.block_diag(*rotation(adapter.Q.detach(), 4).expand(3, 4, 4))
    W = adapter.weight(layer.weight).detach()
    torch.testing.assert_close(W, layer.weight @ R.mT)
    assert adapter.Q.shape == (1 if share else 3, 6)
    # Norms of the rows and the angles between them are kept.
    torch.testing.assert_close(W @ W.mT, layer.weight @ layer.weight.mT)


def test_exact_and_series_turn_the_same_way() -> None:
    layer = linear()
    exact, series = (build(OFT(block=4, terms=terms), layer, size=0.02) for terms in (None, 6))
    change = exact.weight(layer.weight) - layer.weight
    torch.testing.assert_close(series.weight(layer.weight) - layer.weight, change, rtol=1e-3, atol=1e-5)
    assert change.norm() > 0.01


def test_number_of_blocks_and_their_size_say_the_same() -> None:
    assert OFT(blocks=3).size(12) == OFT(block=4).size(12) == 4
    with pytest.raises(OptionError, match="block=4 and blocks=3 were both given"):
        OFT(block=4, blocks=3)


def test_size_that_does_not_divide_is_refused_unless_the_nearest_is_asked_for() -> None:
    with pytest.raises(OptionError, match=r"block=5 does not divide the 12 numbers .* nearest that does is 4"):
        OFT(block=5).size(12)
    with pytest.raises(OptionError, match="blocks=5 does not divide"):
        OFT(blocks=5).size(12)
    assert OFT(block=5, nearest=True).size(12) == 4
    assert OFT(blocks=5, nearest=True).size(12) == 3
    assert [OFT().size(d) for d in (384, 48, 24, 7)] == [16, 16, 12, 7]
    with pytest.raises(OptionError, match=r"size 1 have nothing to rotate.* block=97"):
        OFT().size(97)


@pytest.mark.parametrize(
    ("radius", "expected"), [("official", 0.01 * 16 / math.sqrt(3)), ("peft", 0.01 / math.sqrt(3))]
)
def test_coft_keeps_every_block_within_its_radius(radius: str, expected: float) -> None:
    adapter = build(OFT(block=4, eps=0.01, radius=radius), linear(), size=1.0)
    adapter.Q.data[1] *= 1e-4
    before = adapter.Q.detach().clone()
    adapter.after_step(1.0)
    norms = torch.linalg.matrix_norm(skewed(adapter))
    assert torch.equal(adapter.Q[1], before[1])
    torch.testing.assert_close(norms[[0, 2]], torch.full((2,), expected, dtype=torch.float64))
    after = adapter.Q.detach().clone()
    adapter.after_step(1.0)
    assert torch.equal(adapter.Q, after)


def skewed(adapter: Any) -> torch.Tensor:
    """Q as full matrices, written out."""
    Q = torch.zeros(len(adapter.Q), adapter.b, adapter.b, dtype=torch.float64)
    rows, columns = torch.triu_indices(adapter.b, adapter.b, 1)
    Q[:, rows, columns] = adapter.Q.detach()
    return Q - Q.mT


def test_radius_is_that_of_pefts_projection() -> None:
    config = peft.OFTConfig(oft_block_size=4, coft=True, eps=0.5, use_cayley_neumann=False, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(12, 5)), config).base_model.model[0].oft_R["default"]
    theirs.weight.data = torch.randn(3, 6)
    ours = build(OFT(block=4, eps=0.5, radius="peft"), linear()).float()
    ours.Q.data = theirs.weight.data.clone()
    ours.after_step(1.0)
    theirs(torch.randn(2, 12))
    torch.testing.assert_close(ours.Q, theirs.weight)


def test_magnitudes_scale_the_outputs_and_can_be_fitted_after_the_rotation() -> None:
    layer, x = linear(), torch.randn(6, 12, dtype=torch.float64)
    adapter = build(OFT(block=4, magnitude=True), layer)
    plain = build(OFT(block=4), layer)
    plain.Q.data = adapter.Q.data
    W = plain.weight(layer.weight).detach()
    torch.testing.assert_close(adapter(x, require_site(layer, "")), x @ (adapter.s[:, None] * W).mT + layer.bias)
    adapter.Q.requires_grad_(False)
    adapter(x, require_site(layer, "")).square().sum().backward()
    assert adapter.Q.grad is None
    assert adapter.s.grad.abs().min() > 0


def test_dropout_makes_blocks_the_identity_in_training_only_and_never_in_the_weight() -> None:
    layer = linear()
    site, eye = require_site(nn.Linear(12, 12, bias=False).double(), ""), torch.eye(12, dtype=torch.float64)
    site.layer.weight.data = eye.clone()
    adapter = build(OFT(block=4, dropout=0.5), layer).train()
    R = adapter(eye, site).detach()
    untouched = [torch.equal(R[k : k + 4, k : k + 4], eye[:4, :4]) for k in (0, 4, 8)]
    assert sum(untouched) == 1
    torch.testing.assert_close(adapter.eval()(eye, site), adapter.train().weight(eye).mT)


def test_embedding_turns_the_rows_that_leave_it() -> None:
    layer = nn.Embedding(7, 6).double().requires_grad_(False)
    adapter = build(OFT(block=3), layer)
    R = torch.block_diag(*rotation(adapter.Q.detach(), 3))
    got = adapter(torch.arange(7), require_site(layer, ""))
    torch.testing.assert_close(got, layer.weight @ R)


def peft_load(model: nn.Module, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about sizes that it adjusts
        return peft.PeftModel.from_pretrained(model, folder).eval()


def peft_adapt(model: nn.Module, config: peft.PeftConfig, size: float = 0.05) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return move(peft.get_peft_model(model, config), size=size)


@st.composite
def drawn_options(draw: st.DrawFn) -> dict[str, Any]:
    size = draw(st.sampled_from([{}, {"block": 4}, {"blocks": 4}, {"block": 15, "nearest": True}]))
    coft = draw(st.sampled_from([{}, {"eps": 0.3, "radius": "peft"}]))
    return {**size, **coft, "share": draw(st.booleans()), "terms": draw(st.sampled_from([None, 4, 5, 7]))}


@profile(max_examples=8)
@given(drawn_options(), st.integers(0, 99))
def test_peft_computes_the_same_from_what_isotune_saves(
    tmp_path_factory: pytest.TempPathFactory, options: dict[str, Any], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("oft")
    model = adapted(stories(), OFT(**options), LLAMA, seed=seed)
    isotune.after_step(model)
    isotune.save(model, folder)
    assert_same_output(output(peft_load(stories(), folder)), output(model))
    assert torch.equal(output(isotune.load(stories(), folder).eval()), output(model))
    assert not torch.allclose(output(model), output(stories()), atol=1e-3)


CONFIGS = {
    "series": {"oft_block_size": 16},
    "exact": {"oft_block_size": 16, "use_cayley_neumann": False},
    "three terms are four": {"oft_block_size": 16, "num_cayley_neumann_terms": 3},
    "number of blocks": {"r": 4, "oft_block_size": 0, "num_cayley_neumann_terms": 7},
    "adjusted size": {"oft_block_size": 20},
    "shared": {"oft_block_size": 8, "block_share": True, "use_cayley_neumann": False},
    "coft": {"oft_block_size": 8, "coft": True, "eps": 0.4},
}


@pytest.mark.parametrize(("base", "targets"), [(minilm, ["query", "value"]), (stories, [*LLAMA, "embed_tokens"])])
@pytest.mark.parametrize("config", CONFIGS)
def test_isotune_computes_the_same_from_what_peft_saves(
    base: Any, targets: list[str], config: str, tmp_path: Path
) -> None:
    theirs = peft_adapt(base(), peft.OFTConfig(target_modules=targets, **CONFIGS[config]))
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    loaded = isotune.load(base(), tmp_path / "theirs").eval()
    assert_same_output(output(loaded), output(theirs))
    isotune.save(loaded, tmp_path / "ours")
    assert_same_output(output(peft_load(base(), tmp_path / "ours")), output(theirs))


def test_peft_turns_the_other_way_when_the_series_is_toggled_and_isotune_does_not() -> None:
    layers = []
    for series in (True, False):
        config = peft.OFTConfig(oft_block_size=4, use_cayley_neumann=series, target_modules=["0"])
        theirs = peft_adapt(nn.Sequential(nn.Linear(8, 8)), config, size=0.01)
        layers.append(theirs.base_model.model[0].get_delta_weight("default").detach())
    assert_same_output(layers[1], layers[0].mT)
    assert (layers[1] - layers[0]).norm() > 0.01


@pytest.mark.parametrize("kernel", [3, (2, 3)])
def test_peft_convolutions_above_one_are_wrong_before_training_and_isotunes_are_right(
    kernel: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(4, 6, kernel)).eval()
    x = torch.randn(2, 4, 9, 9)
    expected = base(x)
    if kernel == 3:
        theirs = peft_adapt(nn.Sequential(base[0]), peft.OFTConfig(oft_block_size=4, target_modules=["0"]), size=0.0)
        assert (theirs(x) - expected).abs().max() > expected.abs().max()
        # Its merge is right: it is the rotated kernel that isotune computes with.
        assert_same_output(theirs.merge_and_unload()(x), expected)
    model = isotune.adapt(base, OFT(block=4), ["0"])
    assert_same_output(model(x), expected)
    isotune.save(move(model), tmp_path)
    assert '"peft_type": "ISOTUNE_OFT"' in (tmp_path / "adapter_config.json").read_text()
    assert "sums up before it convolves" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}])
def test_convolutions_of_kernel_one_go_both_ways(options: dict[str, Any], tmp_path: Path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(8, 6, 1, **options)).eval()

    x = torch.randn(2, 8, 5, 5)
    model = adapted(base(), OFT(block=4), ["0"])
    isotune.save(model, tmp_path / "ours")
    theirs = peft_load(base(), tmp_path / "ours")
    assert_same_output(theirs(x), model(x))
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_output(isotune.load(base(), tmp_path / "theirs")(x), model(x))


def test_peft_ignores_its_dropout() -> None:
    config = peft.OFTConfig(oft_block_size=4, module_dropout=0.9, target_modules=["0"])
    theirs = peft_adapt(nn.Sequential(nn.Linear(32, 8)), config)
    x = torch.randn(3, 32)
    assert torch.equal(theirs.train()(x), theirs.eval()(x))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"magnitude": True}, "PEFT's OFT has no magnitudes"),
        ({"terms": 3}, "computes four terms .* where three"),
        ({"eps": 0.1}, "depends on the size of the blocks"),
    ],
)
def test_what_peft_cannot_say_is_saved_as_isotunes_own(options: dict[str, Any], why: str, tmp_path: Path) -> None:
    model = adapted(stories(), OFT(**options), LLAMA)
    isotune.after_step(model)
    isotune.save(model, tmp_path)
    config = (tmp_path / "adapter_config.json").read_text()
    assert '"peft_type": "ISOTUNE_OFT"' in config
    assert torch.equal(output(isotune.load(stories(), tmp_path).eval()), output(model))
    with pytest.raises(NotInPEFTError, match=why):
        dialect_of(OFT).config({"": OFT(**options)})


def test_official_radius_becomes_pefts_where_the_size_is_known() -> None:
    assert dialect_of(OFT).config({"": OFT(block=8, eps=0.01)})["eps"] == pytest.approx(0.64)


def test_series_of_fewer_than_three_terms_is_refused(tmp_path: Path) -> None:
    config = peft.OFTConfig(oft_block_size=16, num_cayley_neumann_terms=2, target_modules=LLAMA)
    peft_adapt(stories(), config).save_pretrained(tmp_path)
    with pytest.raises(IsotuneError, match="num_cayley_neumann_terms=2 is not supported"):
        isotune.load(stories(), tmp_path)
