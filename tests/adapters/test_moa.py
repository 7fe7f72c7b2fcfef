"""What is particular to mixtures of adapters: shares of experts by token, and slots that mix those of a text."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import isotune
from isotune.errors import OptionError
from isotune.sites import require_site
from support import adapted, assert_same_output, minilm, move, output, tokens

GELU = nn.functional.gelu


def block() -> Any:
    """A model of one small block, in float64."""
    torch.manual_seed(0)
    inside = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))
    return nn.Sequential(OrderedDict(block=inside)).double()


def beside(size: float = 0.5, **options: Any) -> tuple[Any, Any]:
    """A small block with the adapter on it, off its start and in float64, and the adapter."""
    model = block()
    method = isotune.method("moa", **{"rank": 3, "experts": 2, **options})
    move(isotune.adapt(model, method, ["block"], seed=0), size=size)
    return model, model.block.isotune["default"]


def expert(adapter: Any, e: int, v: Tensor) -> Tensor:
    """What one expert makes of one token v (in)."""
    return adapter.U[e] @ GELU(adapter.D[e] @ v + adapter.d[e]) + adapter.u[e]


def slots_by_hand(adapter: Any, text: Tensor, slots: int) -> Tensor:
    """The change of the soft form for one text (n, in), slot by slot and token by token."""
    E, n = len(adapter.D), len(text)
    logits = torch.stack([adapter.G @ token for token in text])  # (n, E S)
    rows = [torch.zeros(5, dtype=text.dtype) for _ in range(n)]
    for place in range(E * slots):
        share = torch.softmax(logits[:, place], 0)
        mixed = sum(share[m] * text[m] for m in range(n))
        made = expert(adapter, place // slots, mixed)  # type: ignore[arg-type]
        for m in range(n):
            rows[m] = rows[m] + torch.softmax(logits[m], 0)[place] * made
    return torch.stack(rows)


@pytest.mark.parametrize("place", ["parallel", "sequential"])
def test_every_token_gets_a_share_of_all_experts(place: str) -> None:
    model, adapter = beside(place=place, experts=3)
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    with isotune.disabled(model):
        y = model(x)
    v = x if place == "parallel" else y
    for b in range(2):
        for n in range(6):
            p = torch.softmax(adapter.G @ v[b, n] + adapter.g, 0)
            y[b, n] += sum(p[e] * expert(adapter, e, v[b, n]) for e in range(3)).detach()  # type: ignore[union-attr]
    torch.testing.assert_close(model(x), y)


@pytest.mark.parametrize("slots", [1, 2])
def test_slots_mix_the_tokens_of_a_text_and_no_others(slots: int) -> None:
    model, adapter = beside(routing="soft", slots=slots)
    x = torch.randn(3, 7, 4, dtype=torch.float64)
    with isotune.disabled(model):
        y = model(x)
    expected = y + torch.stack([slots_by_hand(adapter, text, slots) for text in x])
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model(x[1:2]), expected[1:2])
    torch.testing.assert_close(model(x.view(3, 7, 1, 4)), expected.view(3, 7, 1, 5))
    alone = model(x[:, :1])  # rows without a dimension for time are texts of one token
    torch.testing.assert_close(model(x[:, 0]), alone[:, 0])


@pytest.mark.parametrize("place", ["parallel", "sequential"])
def test_one_expert_is_the_bottleneck_adapter(place: str) -> None:
    model, adapter = beside(experts=1, place=place)
    other = block()
    isotune.adapt(other, isotune.method("houlsby", rank=3, place=place), ["block"], seed=1)
    bottleneck = other.block.isotune["default"]
    with torch.no_grad():
        for name in ("D", "d", "U", "u"):
            getattr(bottleneck, name).copy_(getattr(adapter, name)[0])
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    torch.testing.assert_close(model(x), other(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("place", ["parallel", "sequential"])
def test_padding_is_in_no_slot(place: str) -> None:
    model, _ = beside(routing="soft", slots=2, place=place)
    x = torch.randn(2, 7, 4, dtype=torch.float64)
    alone = model(x[1:, :4])
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    assert not torch.allclose(model(x)[1:, :4], alone, atol=1e-3)
    isotune.tokens(model, mask)
    torch.testing.assert_close(model(x)[1:, :4], alone)
    torch.testing.assert_close(model(x[1:, :4]), alone)  # the mask is of another batch
    isotune.tokens(model, torch.zeros_like(mask))
    assert model(x).isfinite().all()


@pytest.mark.parametrize("routing", ["dense", "soft"])
def test_gradients_are_derivatives_on_texts(routing: str) -> None:
    model, _ = beside(routing=routing, slots=2)
    isotune.tokens(model, torch.tensor([[1, 1, 1], [1, 1, 0]]))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    values = [p.detach().requires_grad_() for p in model.parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(
        lambda x, *own: functional_call(model, dict(zip(names, own, strict=True)), x), (x, *values), fast_mode=True
    )


@pytest.mark.parametrize("routing", ["dense", "soft"])
def test_all_of_it_learns_from_a_start_at_the_base(routing: str, tmp_path: Path) -> None:
    method = isotune.method("moa", rank=2, experts=3, slots=2, routing=routing)
    model = isotune.adapt(minilm(), method, ["layer.1", "layer.4"], seed=0)
    assert torch.equal(output(model.eval()), output(minilm()))
    isotune.tokens(model.train(), tokens(model)["attention_mask"])
    own = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in own]
    optimizer = torch.optim.AdamW(own, lr=0.02, weight_decay=0.0)
    goal = torch.randn(2, 12, 384, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = (model(**tokens(model))[0] - goal).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert not any(torch.equal(new, old) for new, old in zip(own, before, strict=True))
    gate = model.encoder.layer[1].isotune["default"].G
    assert gate.grad.abs().max() > 0
    isotune.tokens(model.eval(), None)
    isotune.save(model, tmp_path)
    assert torch.equal(output(isotune.load(minilm(), tmp_path).eval()), output(model))


def test_a_padded_batch_of_a_real_encoder_is_each_text_alone() -> None:
    method = isotune.method("moa", rank=4, experts=3, routing="soft")
    model = adapted(minilm(), method, ["layer.2", "layer.3"], size=0.2)
    batch = tokens(model)
    unaware = output(model, **batch)[1, :8]
    isotune.tokens(model, batch["attention_mask"])
    together = output(model, **batch)[1, :8]
    isotune.tokens(model, None)
    alone = output(model, input_ids=batch["input_ids"][1:, :8])[0]
    assert_same_output(together, alone)
    assert not torch.allclose(unaware, alone, atol=1e-3)


def test_counts_and_wrong_options() -> None:
    for options in ({"routing": "dense"}, {"routing": "soft", "slots": 3}):
        model, adapter = beside(**options, place="sequential")
        from_settings = adapter.settings.parameter_count(require_site(model.block, "block"))
        assert from_settings == sum(p.numel() for p in adapter.parameters())
    with pytest.raises(OptionError, match="routing"):
        isotune.method("moa", routing="hard")
