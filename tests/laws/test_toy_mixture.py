"""A mixture made in a test file: it inherits every law with its router, and follows `isotune.route` without."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from pydantic import Field
from torch import nn

import isotune
from isotune import IsotuneError, LoRA, Mixture, Settings
from isotune.adapters.low_rank.lora import LoRAAdapter
from isotune.adapters.mixed import NO_WEIGHT
from isotune.sites import Site
from laws.suite import laws_of
from support import adapted, assert_same_output, move, output, stories


class Experts(Settings):
    """y = f(x) + Σ_k w_k B_k A_k x, w by a linear router."""

    name: ClassVar[str] = "experts"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    learning_rate: ClassVar[float] = 1e-3
    formula: ClassVar[str] = "2 * (n_in + n_out) + 2 * n_in"
    exempt: ClassVar[dict[str, str]] = dict(NO_WEIGHT)

    routed: bool = Field(True, description="Whether a router decides; else isotune.route does.")

    def build(self, site: Site, generator: torch.Generator) -> ExpertsAdapter:
        A = torch.randn(2, 1, site.in_features, generator=generator)
        experts = [LoRAAdapter(own, torch.zeros(site.out_features, 1)) for own in A]
        router = torch.nn.utils.skip_init(nn.Linear, site.in_features, 2, bias=False)
        router.weight.data = torch.randn(2, site.in_features, generator=generator)
        return ExpertsAdapter(experts, router if self.routed else None)

    def parameter_count(self, site: Site) -> int:
        return 2 * (site.in_features + site.out_features) + (2 * site.in_features if self.routed else 0)


class ExpertsAdapter(Mixture):
    """Two experts of rank 1."""

    method = "experts"


class WithRouter(Experts):
    """The same, with no option."""

    name: ClassVar[str] = "with_router"
    routed: ClassVar[bool] = True  # type: ignore[misc]


test_law_holds_for_the_toy = laws_of(WithRouter)


def two(model: nn.Module) -> Any:
    return move(isotune.adapt(model, Experts(routed=False), "all-linear", seed=0), size=0.3)


def test_routing_from_outside_weighs_the_experts_of_every_row() -> None:
    model = two(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)))
    x, weights = torch.randn(3, 7, 6), torch.rand(3, 2)
    with pytest.raises(IsotuneError, match=r"experts has no router.*isotune.route"):
        model(x)
    isotune.route(model, weights.requires_grad_())
    layer, y = model[0], model[0](x)
    experts = layer.isotune["default"].experts
    expected = nn.functional.linear(x, layer._parameters["weight"], layer._parameters["bias"])
    for k, expert in enumerate(experts):
        B, A = expert.change()
        expected = expected + weights[:, k, None, None] * (x @ A.mT @ B.mT)
    assert_same_output(y, expected)
    y.sum().backward()
    assert weights.grad.abs().min() > 0
    with pytest.raises(IsotuneError, match=r"3 columns for the experts of experts \(2\)"):
        isotune.route(model, torch.rand(3, 3))


def test_routing_of_adapters_is_their_weighted_sum_and_one_hot_that_of_use() -> None:
    model = adapted(stories(), LoRA(rank=2), "all-linear", name="a", seed=1)
    adapted(model, LoRA(rank=3), "all-linear", name="b", seed=2)
    ids = {"input_ids": torch.arange(5, 25).view(4, 5)}
    by_rows = output(isotune.use(model, rows=["a", None, "b", "a"]), **ids)
    weights = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert_same_output(output(isotune.route(model, weights, "a", "b"), **ids), by_rows)
    layer, x = model.model.layers[0].mlp.up_proj, torch.randn(4, 5, 64)
    half = torch.full((4, 2), 0.5)
    isotune.route(model, half, "a", "b")
    alone = []
    y = layer(x)
    for name in ("a", "b"):
        isotune.use(model, name)
        alone.append(layer(x))
    assert_same_output(y, (alone[0] + alone[1]) / 2)


def test_rows_follow_beams_and_reach_the_decoder() -> None:
    import transformers

    model: Any = stories()
    for seed, name in enumerate(("a", "b")):
        adapted(model, LoRA(rank=2), "all-linear", name=name, seed=seed, size=0.2)
    prompt = torch.arange(5, 9).view(1, 4)
    options: dict[str, Any] = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    alone = [isotune.use(model, name).generate(prompt, **options)[0].tolist() for name in ("a", "b")]
    together = isotune.use(model, rows=["a", "b"]).generate(prompt.repeat(2, 1), **options)
    assert [row.tolist()[: len(one)] for row, one in zip(together, alone, strict=True)] == alone

    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=50, decoder_start_token_id=0
    )
    t5: Any = transformers.T5ForConditionalGeneration(config).eval()
    for seed, name in enumerate(("a", "b")):
        adapted(t5, LoRA(rank=2), "all-linear", name=name, seed=seed, size=0.5)
    ids = torch.arange(5, 15)[None]
    options = {"max_new_tokens": 5, "num_beams": 2, "do_sample": False}
    alone = [isotune.use(t5, name).generate(input_ids=ids, **options)[0].tolist() for name in ("a", "b")]
    together = isotune.use(t5, rows=["a", "b"]).generate(input_ids=ids.repeat(2, 1), **options)
    assert [row.tolist()[: len(one)] for row, one in zip(together, alone, strict=True)] == alone
