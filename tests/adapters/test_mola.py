"""What is particular to MoLA: experts by token, more of them in higher layers, and how evenly they are used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import isotune
from isotune.adapters.mixture.mola import MoLAAdapter
from isotune.errors import IsotuneError, OptionError
from isotune.sites import Site
from support import adapted, assert_same_output, move, output, stories, tokens


def layer(**options: Any) -> tuple[nn.Linear, Any, nn.Module]:
    """A bare layer, the adapter on its twin, and the adapted twin."""
    torch.manual_seed(0)
    bare, model = nn.Linear(6, 5), nn.Sequential(nn.Linear(6, 5))
    bare.load_state_dict(model[0].state_dict())
    method = isotune.method("mola", **{"rank": 2, "experts": 4, "top_k": 2, **options})
    move(isotune.adapt(model, method, ["0"], seed=0), size=0.5)
    return bare, model[0].isotune["default"], model


def by_hand(bare: nn.Linear, adapter: Any, x: Tensor, k: int, s: float = 1.0) -> Tensor:
    """Token by token and expert by expert."""
    y = bare(x).detach()
    for row in range(len(x)):
        z = (adapter.router.weight @ x[row]).tolist()
        chosen = sorted(range(len(z)), key=lambda e: -z[e])[:k]
        weights = torch.softmax(torch.tensor([z[e] for e in chosen]), 0)
        for weight, e in zip(weights, chosen, strict=True):
            y[row] += s * weight * (adapter.experts[e].B @ (adapter.experts[e].A @ x[row])).detach()
    return y


@pytest.mark.parametrize("k", [1, 2, 4])
def test_every_token_gets_its_experts(k: int) -> None:
    bare, adapter, model = layer(top_k=k, alpha=4.0)
    x = torch.randn(9, 6)
    assert_same_output(model(x), by_hand(bare, adapter, x, k, s=2.0))
    weights = adapter.weights(x, None)
    torch.testing.assert_close(weights.sum(-1), torch.ones(9))
    assert ((weights > 0).sum(-1) == k).all()


def test_one_expert_is_a_lora_and_their_order_does_not_matter() -> None:
    bare, adapter, model = layer(experts=1, top_k=1)
    x = torch.randn(9, 6)
    expert = adapter.experts[0]
    assert_same_output(model(x), bare(x) + x @ expert.A.mT @ expert.B.mT)
    _, adapter, model = layer()
    before = model(x)
    order = [2, 0, 3, 1]
    adapter.experts = nn.ModuleList([adapter.experts[e] for e in order])
    adapter.router.weight.data = adapter.router.weight.data[order]
    assert_same_output(model(x), before)


def test_the_balance_is_one_for_even_use_counts_no_padding_and_reaches_the_router() -> None:
    bare, adapter, model = layer(experts=3, top_k=1, balance=0.5)
    del bare
    model.train()
    adapter.router.weight.data = torch.cat([torch.eye(3), torch.zeros(3, 3)], dim=1) * 1e-3
    x = torch.eye(6)[:3].repeat(2, 1)[None]
    model(x)
    penalty = isotune.penalty(model)
    torch.testing.assert_close(penalty.detach(), torch.tensor(0.5))
    penalty.backward()
    adapter.router.weight.data[:, 3] = torch.tensor([8.0, 0.0, 0.0])  # where all that is padding goes
    padded = torch.cat([x, torch.eye(6)[3].expand(1, 6, 6)], dim=1)
    uneven = padding_unknown = None
    for mask in (None, torch.tensor([[1] * 6 + [0] * 6])):
        isotune.tokens(model, mask)
        model(padded)
        uneven, padding_unknown = isotune.penalty(model), uneven
    assert padding_unknown is not None
    assert uneven is not None
    torch.testing.assert_close(uneven.detach(), torch.tensor(0.5))
    assert padding_unknown > 0.6
    padding_unknown.backward()
    assert adapter.router.weight.grad.abs().max() > 0
    model.eval()(x)
    assert isotune.penalty(model) == 0


class Deaf(MoLAAdapter):
    """A broken twin: no gradient reaches its router."""

    def weights(self, x: Tensor, site: Site) -> Tensor:
        return super().weights(x, site).detach()


@pytest.mark.parametrize("kind", [MoLAAdapter, Deaf])
def test_the_router_and_what_it_chose_move_within_two_steps(kind: type[MoLAAdapter]) -> None:
    model: Any = isotune.adapt(
        nn.Sequential(nn.Linear(6, 5)), isotune.method("mola", rank=2, experts=3, top_k=3), ["0"], seed=0
    )
    model[0].isotune["default"].__class__ = kind
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.0)
    x = torch.randn(20, 6)
    for _ in range(2):
        optimizer.zero_grad()
        (model(x) - 1).square().sum().backward()
        optimizer.step()
    after = [p for p in model.parameters() if p.requires_grad]
    still = [torch.equal(new, old) for new, old in zip(after, before, strict=True)]
    assert any(still) is (kind is Deaf)


def test_higher_layers_get_more_experts_and_all_is_kept(tmp_path: Path) -> None:
    method = isotune.method("mola", rank=2, experts="2-3", top_k=2)
    model = adapted(stories(), method, "all-linear", size=0.3)
    counts = [len(model.model.layers[k].mlp.up_proj.isotune["default"].experts) for k in range(5)]
    assert counts == [2, 2, 2, 3, 3]
    isotune.save(model, tmp_path / "adapter")
    loaded: Any = isotune.load(stories(), tmp_path / "adapter").eval()
    assert torch.equal(output(loaded), output(model))
    ids = tokens(model)["input_ids"][:1, :6]
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


def test_what_it_cannot_do_is_said(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="top_k=3 experts for each token, and layers with 2"):
        isotune.method("mola", experts="2-4", top_k=3)
    with pytest.raises(OptionError, match="experts"):
        isotune.method("mola", experts="2-x")
    model = adapted(stories(), isotune.method("mola", rank=2), ["q_proj"], size=0.3)
    for ask in (isotune.fold, lambda m: isotune.export_lora(m, tmp_path / "lora"), isotune.compact):
        with pytest.raises(IsotuneError, match="mola"):
            ask(model)
    assert not (tmp_path / "lora").exists()
