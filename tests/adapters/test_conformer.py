"""What is particular to the conformer adapter: its convolution over time, its norms, its padding."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import isotune
from isotune.sites import require_site
from support import assert_same_output, minilm, move, output, tokens


def block() -> Any:
    """A model of one small block, in float64."""
    torch.manual_seed(0)
    inside = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))
    return nn.Sequential(OrderedDict(block=inside)).double()


def beside(**options: Any) -> tuple[Any, Any]:
    """A small block with the adapter on it, off its start and in float64, and the adapter."""
    model = block()
    method = isotune.method("conformer", **{"rank": 3, "kernel": 3, **options})
    move(isotune.adapt(model, method, ["block"], seed=0), size=0.5)
    return model, model.block.isotune["default"]


def by_hand(adapter: Any, v: Tensor, k: int, causal: bool = False, skips_norm: bool = False) -> Tensor:
    """The change for texts v (b, n, in), step by step, of a norm that is a LayerNorm or has fixed statistics."""
    x = v if skips_norm else F.layer_norm(v, v.shape[-1:], adapter.before.weight, adapter.before.bias)
    a, c = (x @ adapter.V.mT + adapter.w).chunk(2, -1)
    z = a / (1 + torch.exp(-c))
    _, n, m = z.shape
    first = k - 1 if causal else (k - 1) // 2
    mixed = torch.zeros_like(z)
    for t in range(n):
        for j in range(k):
            if 0 <= t + j - first < n:
                mixed[:, t] += adapter.K[:, 0, j] * z[:, t + j - first]
    norm = adapter.behind
    if isinstance(norm, nn.BatchNorm1d):
        made = (mixed - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    else:
        made = F.layer_norm(mixed, (m,), norm.weight, norm.bias)
    return made * torch.sigmoid(made) @ adapter.U.mT + adapter.u


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("place", ["parallel", "sequential"])
@pytest.mark.parametrize(("kernel", "causal"), [(3, False), (4, False), (9, False), (4, True)])
def test_it_is_what_the_paper_writes_with_the_norm_that_the_code_discards(
    kernel: int, causal: bool, place: str, norm: str
) -> None:
    model, adapter = beside(kernel=kernel, causal=causal, place=place, norm=norm)
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    y = block()(x)
    v = x if place == "parallel" else y
    torch.testing.assert_close(model(x), y + by_hand(adapter, v, kernel, causal))
    theirs = y + by_hand(adapter, v, kernel, causal, skips_norm=True)
    assert not torch.allclose(model(x), theirs, atol=1e-3)


def test_a_causal_convolution_sees_no_later_token_and_the_symmetric_one_does() -> None:
    x = torch.randn(1, 6, 4, dtype=torch.float64)
    other = x.clone()
    other[:, 4:] = torch.randn(1, 2, 4, dtype=torch.float64)
    for causal in (True, False):
        model, _ = beside(causal=causal)
        same = torch.allclose(model(x)[:, :4], model(other)[:, :4], atol=1e-12)
        assert same is causal


def test_rows_without_time_are_texts_of_one_token() -> None:
    model, _ = beside()
    x = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(model(x), model(x.unsqueeze(1)).squeeze(1))


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_padding_counts_as_nothing(norm: str) -> None:
    x = torch.randn(2, 7, 4, dtype=torch.float64)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    model, _ = beside(norm=norm)
    alone = model(x[1:, :4])
    assert not torch.allclose(model(x)[1:, :4], alone, atol=1e-3)
    isotune.tokens(model, mask)
    torch.testing.assert_close(model(x)[1:, :4], alone)
    found = []
    for filler in (0.0, 100.0):  # while training, whatever is in the padding
        model, adapter = beside(norm=norm)
        isotune.tokens(model.train(), mask)
        y = model(x.masked_fill(mask[..., None] == 0, filler))[mask.bool()]
        found.append([y.detach(), *(tensor.clone() for tensor in adapter.buffers())])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)


def test_statistics_are_those_of_real_tokens_and_belong_to_the_adapter(tmp_path: Path) -> None:
    model, adapter = beside()
    x, mask = torch.randn(2, 7, 4, dtype=torch.float64), torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    seen: list[Tensor] = []
    adapter.behind.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    base = {name: t.clone() for name, t in block().state_dict().items()}
    isotune.tokens(model.train(), mask)
    model(x)
    assert seen[0].shape == (11, 3)
    torch.testing.assert_close(adapter.behind.running_mean, 0.1 * seen[0].mean(0))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in base.items())
    isotune.tokens(model.eval(), None)
    isotune.save(model, tmp_path)
    loaded: Any = isotune.load(block(), tmp_path).eval()
    assert torch.equal(loaded(x), model(x))
    assert torch.equal(loaded.block.isotune["default"].behind.running_var, adapter.behind.running_var)
    fresh, _ = beside()
    assert not torch.allclose(fresh(x), model(x), atol=1e-3)  # the statistics count


def test_rows_depend_on_each_other_in_training_with_the_norm_over_batches_alone() -> None:
    x = torch.randn(3, 6, 4, dtype=torch.float64)
    for norm in ("batch", "layer"):
        model, _ = beside(norm=norm)
        torch.testing.assert_close(model(x)[:1], model(x[:1]))
        model.train()
        assert torch.allclose(model(x)[:1], model(x[:1])) is (norm == "layer")


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_gradients_are_derivatives_while_it_trains(norm: str) -> None:
    model, _ = beside(norm=norm)
    isotune.tokens(model.train(), torch.tensor([[1, 1, 1], [1, 1, 0]]))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    values = [p.detach().requires_grad_() for p in model.parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(
        lambda x, *own: functional_call(model, dict(zip(names, own, strict=True)), x), (x, *values), fast_mode=True
    )


def test_a_padded_batch_of_a_real_encoder_is_each_text_alone() -> None:
    model = isotune.adapt(minilm(), isotune.method("conformer", rank=4), ["layer.2", "layer.3"], seed=0)
    assert torch.equal(output(model.eval()), output(minilm()))
    batch = tokens(move(model, size=0.2))
    isotune.tokens(model, batch["attention_mask"])
    together = output(model, **batch)[1, :8]
    isotune.tokens(model, None)
    assert_same_output(together, output(model, input_ids=batch["input_ids"][1:, :8])[0])


def test_what_is_counted_trains() -> None:
    for options in ({}, {"norm": "layer", "place": "sequential", "kernel": 5}):
        model, adapter = beside(**options)
        counted = adapter.settings.parameter_count(require_site(model.block, "block"))
        assert (
            counted
            == sum(p.numel() for p in adapter.parameters())
            == sum(p.numel() for p in model.parameters() if p.requires_grad)
        )
