"""What is particular to SORSA: its singular values, its penalty."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import isotune
from isotune.adapters.spectral.sorsa import SORSA
from isotune.checkpoint.export_peft import export_peft
from isotune.sites import require_site
from laws.layers import drawn_layer, input_for
from spectral import build, linear, peft_load
from support import adapted, assert_same_output, output, penalty_of, stories


@given(drawn_layer("linear"), st.integers(1, 4), st.sampled_from([None, 3.0]))
def test_start_is_the_undivided_singular_triplets_of_w(layer: nn.Linear, rank: int, alpha: float | None) -> None:
    rank = min(rank, *layer.weight.shape)
    adapter = build(SORSA(rank=rank, alpha=alpha), layer)
    S = torch.linalg.svdvals(layer.weight.detach())
    torch.testing.assert_close(adapter.sigma.detach(), S[:rank], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.weight @ adapter.A.mT, adapter.B * adapter.sigma, rtol=0, atol=1e-5)
    assert adapter.scale == (alpha / rank if alpha else 1)


def test_forward_is_the_residual_and_the_trained_triplets() -> None:
    layer = linear()
    adapter = build(SORSA(rank=3, alpha=6), layer)
    residual = layer.weight - 2 * adapter.B @ adapter.sigma.diag() @ adapter.A
    for parameter in adapter.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    expected = residual + 2 * adapter.B @ adapter.sigma.diag() @ adapter.A
    x = input_for(layer)
    got = adapter(x, require_site(layer, ""))
    torch.testing.assert_close(got, nn.functional.linear(x, expected, layer.bias), rtol=0, atol=1e-7)


@pytest.mark.parametrize("squared", [True, False])
def test_penalty_is_zero_at_the_start_and_then_gamma_times_the_mean_of_the_two_errors(squared: bool) -> None:
    layer = linear()
    adapter = build(SORSA(rank=3, gamma=0.5, squared=squared), layer)
    assert penalty_of(adapter) < 1e-6
    A, B, eye = torch.randn(3, 12).double(), torch.randn(9, 3).double(), torch.eye(3).double()
    adapter.A.data, adapter.B.data = A, B
    errors = [(A @ A.T - eye).norm(), (B.T @ B - eye).norm()]
    expected = 0.5 * sum(e**2 if squared else e for e in errors) / 2
    torch.testing.assert_close(penalty_of(adapter).detach(), expected)
    assert penalty_of(build(SORSA(rank=3, gamma=0), layer)) == 0


def test_penalty_keeps_the_singular_vectors_orthonormal_in_training() -> None:
    def drift(gamma: float) -> float:
        torch.manual_seed(0)
        model = isotune.adapt(nn.Sequential(nn.Linear(16, 12)), SORSA(rank=4, gamma=gamma), ["0"], seed=0)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0)
        x, goal = torch.randn(64, 16), torch.randn(64, 12)
        for _ in range(60):
            optimizer.zero_grad()
            ((model(x) - goal).square().mean() + isotune.penalty(model)).backward()
            optimizer.step()
        A = model[0].isotune["default"].A.detach()
        return float((A @ A.T - torch.eye(4)).norm())

    assert drift(0) > 0.3
    assert drift(10) < 0.1


def test_the_parameters_are_r_in_plus_r_out_plus_r() -> None:
    adapter = build(SORSA(rank=3), linear())
    assert sum(p.numel() for p in adapter.parameters()) == 3 * (12 + 9 + 1)
    assert {name for name, _ in adapter.named_parameters()} == {"A", "B", "sigma"}


def test_export_to_peft_leaves_out_what_only_training_needs(tmp_path: Path) -> None:
    model = adapted(stories(), SORSA(rank=2), ["q_proj"], size=0.02)
    isotune.save(model, tmp_path / "ours")
    found = load_file(export_peft(tmp_path / "ours", tmp_path / "peft") / "adapter_model.safetensors")
    assert {name.rpartition("q_proj.")[2] for name in found} == {"lora_A.weight", "lora_B.weight"}
    assert_same_output(output(peft_load(stories(), tmp_path / "peft")), output(model))


@pytest.mark.parametrize("name", ["lora_B_trained", "lora_sigma", "lora_A.weight"])
def test_a_missing_tensor_is_named(name: str) -> None:
    layer = linear()
    adapter, site = build(SORSA(rank=2), layer), require_site(layer, "")
    state = adapter.peft_state(site)
    del state[name]
    with pytest.raises(KeyError, match=f"missing {name}"):
        adapter.load_peft_state(state, site)
