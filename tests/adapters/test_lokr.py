"""What is particular to LoKr: how sides are split, which factors have a low rank, and both ways with PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lokr.layer import factorization
from torch import Tensor, nn

import isotune
from both_ways import assert_isotune_loads, assert_peft_loads, by_peft
from isotune.adapters.low_rank.lokr import split
from isotune.errors import CheckpointError
from isotune.sites import require_site
from support import adapted, minilm, stories

TARGETS = ["q_proj", "v_proj", "down_proj"]
OPTIONS: list[dict[str, Any]] = [{"rank": 2}, {"rank": 2, "both": True}, {"rank": 99}, {"rank": 2, "factor": 4}]


def lokr(**options: Any) -> isotune.Settings:
    return isotune.method("lokr", **options)


def convolutions() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(4, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 10, 1, stride=2)).eval()


def images(model: nn.Module) -> Tensor:
    return model(torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(0))).detach()


def test_sides_are_split_as_peft_does() -> None:
    for side in range(1, 200):
        for factor in (None, 2, 3, 4, 7, 16):
            assert split(side, factor) == factorization(side, -1 if factor is None else factor), (side, factor)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("layer", [nn.Linear(24, 40), nn.Linear(40, 24), nn.Conv2d(6, 20, 3)], ids=str)
def test_the_change_is_the_kronecker_product_in_every_form(options: dict[str, Any], layer: nn.Module) -> None:
    model = adapted(nn.Sequential(layer), lokr(alpha=3.0, **options), ["0"], size=0.5).double()
    adapter, site = model[0].isotune["default"], require_site(model[0], "0")
    with torch.no_grad():
        own = dict(adapter.named_parameters())
        first, second = (own[f"W{i}"] if f"W{i}" in own else own[f"B{i}"] @ own[f"A{i}"] for i in (1, 2))
        expected = 3.0 / options["rank"] * torch.kron(first, second)
        W = torch.zeros_like(expected)
        torch.testing.assert_close(adapter.weight(W), expected)
        B, A = adapter.factors(W)
        torch.testing.assert_close(B @ A, expected)
        assert B.shape[1] <= min(expected.shape)
    assert sum(p.numel() for p in adapter.parameters()) == lokr(alpha=3.0, **options).parameter_count(site)
    isotune.remove(model)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_language_models_and_convolutions_go_both_ways(options: dict[str, Any], tmp_path: Path) -> None:
    assert_peft_loads(stories, lokr(**options), tmp_path / "one", targets=TARGETS, size=0.3)
    theirs = {"r": options["rank"], "alpha": 2, "decompose_both": options.get("both", False)}
    config = peft.LoKrConfig(target_modules=TARGETS, decompose_factor=options.get("factor", -1), **theirs)
    model = assert_isotune_loads(stories, config, tmp_path / "theirs")
    assert model.model.layers[0].mlp.down_proj.isotune.settings["default"].factor == options.get("factor")
    assert_peft_loads(convolutions, lokr(**options), tmp_path / "conv", images, targets=["0", "2"], size=0.3)
    both = peft.LoKrConfig(target_modules=["0", "2"], decompose_factor=options.get("factor", -1), **theirs)
    assert_isotune_loads(convolutions, both, tmp_path / "convs", images)


def test_an_encoder_with_ranks_of_its_own_goes_to_peft(tmp_path: Path) -> None:
    own = {"key": {"rank": 3, "alpha": 1.0}}
    assert_peft_loads(minilm, lokr(rank=2), tmp_path / "a", targets=["query", "key"], overrides=own, size=0.3)


def test_pefts_other_forms_are_refused(tmp_path: Path) -> None:
    for own, said in (({"module_dropout": 0.1}, "module_dropout=0.1"), ({"use_effective_conv2d": True}, "effective")):
        by_peft(convolutions(), peft.LoKrConfig(r=1, target_modules=["0"], **own), tmp_path / said)
        with pytest.raises(CheckpointError, match=said):
            isotune.load(convolutions(), tmp_path / said)


def test_only_the_small_factor_is_zero_at_the_start_and_both_learn() -> None:
    model = isotune.adapt(nn.Sequential(nn.Linear(24, 40)), lokr(rank=2), ["0"], seed=0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    for _ in range(2):
        model(torch.randn(8, 24)).square().mean().backward()
        optimizer.step()
    assert all(not torch.equal(p.detach(), before[n]) for n, p in model.named_parameters() if n in before)
    assert [n.rpartition(".")[2] for n, value in before.items() if not value.any()] == ["W1"]
