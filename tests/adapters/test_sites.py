"""Layers seen as linear maps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from isotune.errors import NoWeightError, TargetError
from isotune.sites import NORM, require_site, site_of
from laws.layers import KINDS, drawn_layer, fits, input_for


@given(st.sampled_from(KINDS).flatmap(lambda kind: st.tuples(st.just(kind), drawn_layer(kind))))
def test_site_is_the_layer_with_its_own_weight(drawn: tuple[str, nn.Module]) -> None:
    kind, layer = drawn
    site, x = require_site(layer, "layer"), input_for(layer)
    assert fits(kind, {site.kind})
    assert site.weight.shape == (site.out_features, site.in_features)
    assert not site.weight.requires_grad
    assert torch.equal(site.layout(site.weight), layer.weight)
    torch.testing.assert_close(site(x), layer(x), rtol=0, atol=0)
    torch.testing.assert_close(site.forward_with(x, site.weight, site.bias), layer(x), rtol=0, atol=1e-12)


@given(st.sampled_from([kind for kind in KINDS if kind != "norm"]).flatmap(drawn_layer), st.integers(1, 3))
def test_project_then_expand_is_the_layer_with_the_product_as_its_weight(layer: nn.Module, r: int) -> None:
    site, x = require_site(layer, "layer"), input_for(layer)
    B = torch.randn(site.out_features, r, dtype=torch.float64)
    A = torch.randn(r, site.in_features, dtype=torch.float64)
    bias = site.forward_with(x, torch.zeros_like(site.weight), site.bias)
    torch.testing.assert_close(site.expand(site.project(x, A), B), site.forward_with(x, B @ A, site.bias) - bias)


@pytest.mark.parametrize("layer", [nn.LayerNorm(4), nn.RMSNorm(4)], ids=lambda layer: type(layer).__name__)
def test_norms_are_sites_where_they_are_asked_for_and_no_linear_map(layer: nn.Module) -> None:
    assert site_of(layer) is None
    site = site_of(layer, NORM)
    assert site is not None
    assert (site.kind, site.in_features, site.out_features, site.rows(torch.ones(2, 3, 4))) == ("norm", 1, 4, 6)
    for ask in (site.project, site.expand):
        with pytest.raises(NoWeightError, match="is no linear map"):
            ask(torch.ones(4), torch.ones(4, 1))


class Odd(nn.Conv2d):
    """A convolution that computes something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -super().forward(x)


@pytest.mark.parametrize(
    "layer",
    [nn.GroupNorm(2, 4), nn.LSTM(4, 4), Odd(2, 2, 1), nn.Embedding(4, 4, max_norm=1.0), nn.ConvTranspose2d(2, 2, 1)],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_that_are_no_plain_linear_map_have_no_site(layer: nn.Module) -> None:
    assert site_of(layer) is None
    with pytest.raises(TargetError, match=rf"'block.x' is a {type(layer).__name__}, which cannot be adapted"):
        require_site(layer, "block.x")
