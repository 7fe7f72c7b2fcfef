"""Intruder dimensions: cases that can be worked out, and real models against dense decompositions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import isotune
from isotune import HRA, LoRA
from isotune.diagnostics import diagnose, intruder_counts, intruder_dimensions
from isotune.errors import OptionError
from isotune.linalg.low_rank import Factored, dense_svd
from isotune.model.names import adapted_layers
from isotune.sites import require_site
from support import MINILM, STORIES, adapted, minilm, stories


def outer(u: Tensor, v: Tensor, size: float) -> Factored:
    return Factored(size * u[:, None], v[None])


def spread(m: int, n: int) -> Tensor:
    """A matrix whose singular values lie well apart."""
    U, V = (torch.linalg.qr(torch.randn(size, min(m, n)))[0] for size in (m, n))
    return U * torch.linspace(8, 1, min(m, n)) @ V.mT


def directly(W: Tensor, changed: Tensor, k: int, threshold: float, side: str) -> tuple[list[int], Tensor]:
    """The definition, by two dense decompositions in float64."""
    old, new = dense_svd(W.double()), dense_svd(changed.double()).first(k)
    left, right = (old.U.mT @ new.U).abs().amax(0), (old.V.mT @ new.V).abs().amax(0)
    c = {"left": left, "right": right, "both": torch.minimum(left, right)}[side]
    return [j + 1 for j in range(len(c)) if c[j] < threshold], c


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (200, 150)])
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_no_change_has_no_intruders(shape: tuple[int, int], side: Any) -> None:
    W = torch.randn(shape)
    found = intruder_dimensions(W, Factored(torch.zeros(shape[0], 2), torch.randn(2, shape[1])), side=side)
    assert found.indices == []
    assert found.share is None
    torch.testing.assert_close(found.similarity, torch.ones(10))
    torch.testing.assert_close(found.window, torch.ones(10))


def test_what_grows_along_a_direction_of_the_base_is_no_intruder() -> None:
    W = spread(40, 24)
    base = dense_svd(W)
    found = intruder_dimensions(W, outer(base.U[:, 0], base.V[:, 0], 5.0), side="both")
    assert found.indices == []
    torch.testing.assert_close(found.similarity, torch.ones(10), rtol=0, atol=1e-5)
    assert intruder_dimensions(W, 2 * W).indices == []  # all values scaled, no vector turned


def test_a_large_direction_outside_the_column_space_is_the_one_intruder() -> None:
    W = spread(40, 24)
    U = dense_svd(W).U
    u = torch.linalg.qr(torch.cat([U, torch.randn(40, 1)], dim=1))[0][:, -1]
    v = torch.nn.functional.normalize(torch.randn(24), dim=0)
    found = intruder_dimensions(W, outer(u, v, 80.0))
    assert found.indices == [1]
    assert found.similarity[0] < 0.1
    assert found.share == pytest.approx(1, abs=0.02)


def test_an_even_mix_of_all_directions_of_a_square_weight_has_the_cosine_of_the_mix() -> None:
    W = spread(64, 64)
    base = dense_svd(W)
    found = intruder_dimensions(W, outer(base.U.sum(1) / 8, base.V[:, 0], 4000.0))
    assert found.indices == [1]
    assert float(found.similarity[0]) == pytest.approx(1 / 8, rel=0.05)


def test_turning_vectors_of_equal_singular_values_is_new_to_the_paper_but_not_to_the_window() -> None:
    U = torch.linalg.qr(torch.randn(30, 8))[0]
    V = torch.linalg.qr(torch.randn(20, 8))[0]
    S = torch.linspace(5.02, 5, 8)
    turned = torch.linalg.qr(torch.randn(8, 8))[0]
    changed = (U @ turned) * S @ (V @ turned).mT
    W = U * S @ V.mT
    found = intruder_dimensions(W, changed - W, k=8, threshold=0.9)
    assert found.indices
    torch.testing.assert_close(found.window, torch.ones(8), rtol=0, atol=1e-3)


def test_a_rotated_input_leaves_all_left_vectors_alone() -> None:
    W = spread(48, 48)
    R = torch.linalg.qr(torch.randn(48, 48))[0]
    assert intruder_dimensions(W, W @ R - W).indices == []
    assert len(intruder_dimensions(W, W @ R - W, side="right").indices) == 10
    assert len(intruder_dimensions(W, W @ R - W, side="both").indices) == 10


CASES = {
    "lora": (minilm, MINILM, LoRA(rank=4), ["query"], 0.08),
    "lora, stories": (stories, STORIES, LoRA(rank=4), "all-linear", 0.3),
    "hra": (minilm, MINILM, HRA(rank=8), ["query"], 0.05),
    "hra, stories": (stories, STORIES, HRA(rank=4, side="out"), "all-linear", 0.1),
    "oft": (stories, STORIES, isotune.method("oft", block=16), "attention", 0.2),
}


@pytest.mark.parametrize("case", list(CASES))
def test_counts_on_adapters_of_real_models_are_those_of_dense_decompositions(case: str, tmp_path: Path) -> None:
    make, base, method, targets, size = CASES[case]
    model = adapted(make(), method, targets, size=size)
    isotune.save(model, tmp_path)
    layers = dict(adapted_layers(model))
    for side in ("left", "both") if case == "hra" else ("both",):
        found = diagnose(tmp_path, base, side=side, threshold=0.6)
        assert len(found.sites) == len(layers)
        for site in found.sites:
            layer = layers[site.site]
            indices, c = directly(require_site(layer, "").weight, layer.weight.detach(), 10, 0.6, side)
            torch.testing.assert_close(torch.tensor(site.similarity).double(), c, rtol=0, atol=2e-3)
            assert site.intruders == indices
        assert found.total.intruders == sum(len(site.intruders or []) for site in found.sites)
        if case in ("lora", "lora, stories", "oft"):
            assert found.total.intruders > 0


def test_counts_of_a_model_trained_in_full_are_those_of_dense_decompositions(tmp_path: Path) -> None:
    model, before = stories(), stories()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.06 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    found = diagnose(tmp_path, STORIES, side="both")
    assert len(found.sites) == 7 * 5
    for site in found.sites:
        W, changed = (m.get_submodule(site.site).weight.detach() for m in (before, model))
        assert site.intruders == directly(W, changed, 10, 0.5, "both")[0]
    assert found.total.intruders


def test_counts_fall_with_the_threshold() -> None:
    assert intruder_counts([[0.05, 0.5], [0.95, 0.35]], [0.1, 0.5, 0.9]) == {0.1: 1, 0.5: 2, 0.9: 3}
    counts = list(intruder_counts([torch.rand(50).tolist()]).values())
    assert counts == sorted(counts)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"k": 0}, "k=0 is not usable"),
        ({"threshold": 1.5}, "threshold=1.5"),
        ({"side": "top"}, "left, right or both"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        intruder_dimensions(torch.eye(3), torch.eye(3), **settings)
