"""What is particular to PSOFT: the subspace that it rotates, and PEFT's form of it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import settings as profile
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import isotune
from isotune.adapters.orthogonal.psoft import PSOFT
from isotune.errors import CheckpointError, OptionError
from isotune.model.catalogue import linear_site
from isotune.sites import require_site
from support import adapted, assert_same_output, minilm, move, output, stories

LLAMA = ["q_proj", "o_proj", "down_proj"]


def linear(n_in: int = 12, n_out: int = 9) -> nn.Linear:
    return nn.Linear(n_in, n_out).double().requires_grad_(False)


def build(settings: PSOFT, layer: nn.Module, size: float = 0.3) -> Any:
    """An adapter for the layer, off its start."""
    adapter = settings.build(require_site(layer, ""), torch.Generator()).double()
    return move(adapter, size=size)


@given(st.integers(2, 8), st.sampled_from(["orthonormal", "balanced"]), st.integers(0, 99))
def test_only_the_principal_part_of_the_weight_changes(rank: int, basis: str, seed: int) -> None:
    torch.manual_seed(seed)
    W = (layer := linear()).weight.detach()
    adapter = build(PSOFT(rank=rank, basis=basis), layer)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    torch.testing.assert_close(adapter.B @ adapter.A, (U[:, :rank] * S[:rank]) @ Vh[:rank])
    change = adapter.weight(W).detach() - W
    assert change.norm() > 0.1
    torch.testing.assert_close(U[:, rank:].mT @ change, torch.zeros(9 - rank, 12, dtype=W.dtype))
    torch.testing.assert_close(change @ Vh[rank:].mT, torch.zeros(9, 9 - rank, dtype=W.dtype))


@given(st.integers(2, 8), st.integers(0, 99))
def test_without_scales_the_angles_between_the_principal_columns_are_kept(rank: int, seed: int) -> None:
    torch.manual_seed(seed)
    W = (layer := linear()).weight.detach()
    adapter = build(PSOFT(rank=rank, scale_in=False, scale_out=False), layer)
    rest = W - adapter.B @ adapter.A
    new = (adapter.weight(W) - rest).detach()
    # B R A: as many directions as before, turned; the rotation itself is orthogonal.
    R = adapter.rotation().detach()
    torch.testing.assert_close(new, adapter.B @ R @ adapter.A)
    torch.testing.assert_close(R @ R.mT, torch.eye(rank, dtype=W.dtype))
    torch.testing.assert_close(new.norm(), (adapter.B @ R).norm())


def test_parameters_do_not_depend_on_the_width() -> None:
    assert (
        PSOFT(rank=6).parameter_count(linear_site(24, 90))
        == PSOFT(rank=6).parameter_count(linear_site(768, 768))
        == 15 + 12
    )
    assert PSOFT(rank=6, orthogonal=False, scale_in=False).parameter_count(linear_site(24, 90)) == 36 + 6


def test_start_does_not_depend_on_the_signs_of_singular_vectors() -> None:
    layer = linear()
    in_double = PSOFT(rank=5).build(require_site(layer, ""), torch.Generator())
    in_half = PSOFT(rank=5).build(require_site(linear().to(torch.bfloat16), ""), torch.Generator())
    assert in_half.A.dtype == torch.float32
    flipped = linear()
    flipped.weight.data = -layer.weight.data
    again = PSOFT(rank=5).build(require_site(flipped, ""), torch.Generator())
    torch.testing.assert_close(again.A, in_double.A)
    torch.testing.assert_close(again.B, -in_double.B)


def test_long_generator_is_shrunk_to_the_largest_norm_and_a_short_one_is_not() -> None:
    adapters = [build(PSOFT(rank=4, terms=6, largest=0.5), linear(), size) for size in (0.05, 2.0)]
    for adapter, shrunk in zip(adapters, (False, True), strict=True):
        free = build(PSOFT(rank=4, terms=6), linear(), 0.0)
        Q = adapter.R.data
        norm = 2**0.5 * Q.norm()
        assert (norm > 0.5) == shrunk
        free.R.data = Q * (0.5 / norm) if shrunk else Q
        torch.testing.assert_close(adapter.rotation(), free.rotation())


def test_single_direction_without_scales_is_refused() -> None:
    with pytest.raises(OptionError, match="a single direction has no rotation; use rank=2"):
        PSOFT(rank=1, scale_in=False, scale_out=False)
    with pytest.raises(OptionError, match="rank 10 is larger than the layer: its smaller side is 9"):
        build(PSOFT(rank=10), linear())


def peft_load(model: nn.Module, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the copies of A and B, which it does not know
        return peft.PeftModel.from_pretrained(model, folder).eval()


def peft_adapt(model: nn.Module, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return move(peft.get_peft_model(model, peft.PsoftConfig(**options)), size=0.2)


@st.composite
def drawn_options(draw: st.DrawFn) -> dict[str, Any]:
    series = draw(st.sampled_from([{}, {"terms": 5}, {"terms": 4, "largest": 0.4}]))
    svd = draw(st.sampled_from([{}, {"svd": "lowrank", "iterations": 4, "svd_seed": 3}]))
    names = ("orthogonal", "scale_in", "scale_out")
    return {
        **{name: draw(st.booleans()) for name in names},
        **series,
        **svd,
        "rank": draw(st.integers(2, 9)),
        "basis": draw(st.sampled_from(["orthonormal", "balanced"])),
    }


@profile(max_examples=8)
@given(drawn_options(), st.integers(0, 99))
def test_peft_computes_the_same_from_what_isotune_saves(
    tmp_path_factory: pytest.TempPathFactory, options: dict[str, Any], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("psoft")
    model = adapted(stories(), PSOFT(**options), LLAMA, seed=seed, size=0.2)
    isotune.save(model, folder)
    assert_same_output(output(peft_load(stories(), folder)), output(model), 2e-5)
    assert_same_output(output(isotune.load(stories(), folder).eval()), output(model), 1e-6)
    assert not torch.allclose(output(model), output(stories()), atol=1e-3)


CONFIGS = {
    "default": {"r": 6},
    "any alpha": {"r": 6, "psoft_alpha": 7},
    "balanced": {"r": 6, "psoft_alpha": 7, "ab_svd_init": "pissa_init"},
    "series": {"r": 6, "use_cayley_neumann": True, "num_cayley_neumann_terms": 3, "cayley_neumann_eps": 0.5},
    "free": {"r": 5, "psoft_orth": False, "psoft_mag_a": False},
    "lowrank": {"r": 6, "psoft_svd": "lowrank", "psoft_svd_lowrank_niter": 3, "random_seed": 5},
    "one": {"r": 1},
}


@pytest.mark.parametrize(("base", "targets"), [(minilm, ["query"]), (stories, LLAMA)])
@pytest.mark.parametrize("config", CONFIGS)
def test_isotune_computes_the_same_from_what_peft_saves(
    base: Any, targets: list[str], config: str, tmp_path: Path
) -> None:
    theirs = peft_adapt(base(), target_modules=targets, **CONFIGS[config])
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = isotune.load(base(), tmp_path / "theirs").eval()
    assert_same_output(output(loaded), output(theirs), 2e-5)
    isotune.save(loaded, tmp_path / "ours")
    assert_same_output(output(peft_load(base(), tmp_path / "ours")), output(theirs), 2e-5)


def test_stored_subspace_survives_a_base_whose_singular_vectors_come_with_other_signs(tmp_path: Path) -> None:
    model = adapted(stories(), PSOFT(rank=4), LLAMA)
    isotune.save(model, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    A = load_file(path)["base_model.model.model.layers.0.self_attn.q_proj.psoft_A"]
    ours = model.model.layers[0].self_attn.q_proj.isotune["default"]
    assert torch.equal(A, ours.A * ours.signs[:, None])
    # An adapter that was trained where the signs were others.
    ours.signs.neg_()
    isotune.save(model, tmp_path)
    assert_same_output(output(isotune.load(stories(), tmp_path).eval()), output(model), 1e-6)


def test_incomplete_file_is_refused(tmp_path: Path) -> None:
    isotune.save(adapted(stories(), PSOFT(rank=4), ["q_proj"]), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {name: t for name, t in load_file(path).items() if not name.endswith("psoft_A")}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError):
        isotune.load(stories(), tmp_path)


def test_other_layers_are_saved_as_isotunes_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(4, 6, 3)).eval()
    x = torch.randn(2, 4, 7, 7)
    model = adapted(nn.Sequential(base[0]), PSOFT(rank=4), ["0"])
    isotune.save(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "ISOTUNE_PSOFT"
    expected = model(x)
    assert torch.equal(isotune.load(isotune.remove(model), tmp_path)(x), expected)
