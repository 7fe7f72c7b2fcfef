"""What is particular to LT-SFT and to adapting by pruning: which entries stay, chosen over all layers."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import isotune
from isotune.adapters.sparse.lt_sft import LTSFTAdapter
from isotune.linalg.sparse import largest_of_all, packed_bits, unpacked_bits
from isotune.training.weights import load_weights, save_weights
from support import adapted, move, output, stories


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5))


def model_with(name: str, **options: Any) -> Any:
    return isotune.adapt(base(), isotune.method(name, **options), ["0", "2"], seed=0)


def adapters(model: Any) -> list[Any]:
    return [model[k].isotune["default"] for k in (0, 2)]


def train(model: nn.Module, steps: range, of: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
    """Some of the steps of a training towards zero."""
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(own, lr=1e-2, weight_decay=0.1, betas=(0.9, 0.99))
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    for k in steps:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        isotune.after_step(model, (k + 1) / of, optimizer)
    return optimizer


def test_the_largest_of_all_are_exactly_k_and_bits_are_packed_and_unpacked() -> None:
    a, b = torch.tensor([[1.0, 3.0], [3.0, 0.0]]), torch.tensor([3.0, 2.0, 3.0])
    for k, expected in ((3, [2, 1]), (2, [2, 0]), (0, [0, 0]), (7, [4, 3]), (5, [2, 3])):
        found = largest_of_all([a, b], k)
        assert [int(mask.sum()) for mask in found] == expected
        assert [mask.shape for mask in found] == [a.shape, b.shape]
    for shape in ((3, 5), (8, 2), (1, 1)):
        mask = torch.rand(shape) > 0.5
        packed = packed_bits(mask)
        assert packed.numel() == -(-mask.numel() // 8)
        assert torch.equal(unpacked_bits(packed, shape), mask)


def test_lt_sft_keeps_exactly_k_entries_which_alone_move(tmp_path: Path) -> None:
    model = model_with("lt_sft", rank=1)
    K = (8 + 6) + (6 + 5)
    optimizer = train(model, range(4), 10)
    assert all((adapter.D != 0).all() for adapter in adapters(model))
    moved = [adapter.D.detach().abs().clone() for adapter in adapters(model)]
    state = optimizer.state[adapters(model)[0].D]
    assert int(state["step"]) == 4
    train(model, range(4, 5), 10, optimizer)  # the phase ends: all is where it began, and so is the optimizer
    assert not any(adapter.D.any() for adapter in adapters(model))
    assert adapters(model)[0].D not in optimizer.state
    masks = [adapter.mask.clone() for adapter in adapters(model)]
    assert sum(int(mask.sum()) for mask in masks) == K
    least = min(float(values[mask].min()) for values, mask in zip(moved, masks, strict=True))
    most = max(float(values[~mask].max()) for values, mask in zip(moved, masks, strict=True))
    assert least >= 0.5 * most  # the fifth step moved them on
    train(model, range(5, 10), 10, optimizer)
    for adapter, mask, layer in zip(adapters(model), masks, (model[0], model[2]), strict=True):
        assert torch.equal(adapter.mask, mask)
        assert torch.equal(adapter.D != 0, mask)
        W = layer._parameters["weight"]
        assert torch.equal(layer.weight[~mask], W[~mask])
    assert int(optimizer.state[adapters(model)[0].D]["step"]) == 5
    isotune.save(model, tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(t.numel() for name, t in stored.items() if "values" in name) == K
    loaded = isotune.load(base(), tmp_path / "adapter", trainable=True)
    x = torch.randn(3, 8)
    assert torch.equal(loaded(x), model(x))
    train(loaded, range(3), 10)
    assert all(torch.equal(a.D != 0, mask) for a, mask in zip(adapters(loaded), masks, strict=True))


class Drifting(LTSFTAdapter):
    """A broken twin: its mask is chosen, and nothing is kept to it."""

    def weight(self, W: Tensor) -> Tensor:
        return W + self.D

    @classmethod
    def after_steps(cls, adapters: Any, progress: float) -> Any:
        kept = [adapter.D.detach().clone() for adapter in adapters]
        super().after_steps(adapters, progress)
        for adapter, D in zip(adapters, kept, strict=True):
            adapter.D.data.copy_(D)
        return ()


@pytest.mark.parametrize("kind", [LTSFTAdapter, Drifting])
def test_a_mask_that_drifts_is_found(kind: type[LTSFTAdapter]) -> None:
    model = model_with("lt_sft", rank=1)
    for adapter in adapters(model):
        adapter.__class__ = kind
    train(model, range(10), 10)
    moved = [layer.weight != layer._parameters["weight"] for layer in (model[0], model[2])]
    kept = all(not (change & ~adapter.mask).any() for change, adapter in zip(moved, adapters(model), strict=True))
    assert kept is (kind is LTSFTAdapter)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lt_sft", {}),
        ("pruning", {}),
        ("diffora", {"rank": 2, "search": 0.7}),
        ("adalora", {"rank": 4}),
        ("sora", {"rank": 4, "threshold": 0.01}),
        ("splora", {"rank": 2}),
        ("sppara", {}),
        ("splopa", {"prototypes": 3, "block_rows": 2, "block_columns": 3}),
        ("lily", {"rank": 2}),
        ("moa", {"rank": 2, "routing": "soft"}),
        ("conformer", {"rank": 2, "kernel": 3}),
    ],
)
def test_a_training_resumes_in_the_midst_of_a_phase(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    whole = model_with(name, **options)
    train(whole, range(6), 10)
    first = model_with(name, **options)
    optimizer = train(first, range(3), 10)
    save_weights(first, tmp_path, "base")
    again = model_with(name, **options)
    load_weights(again, tmp_path)
    kept = torch.optim.AdamW([p for p in again.parameters() if p.requires_grad], lr=1e-2)
    kept.load_state_dict(optimizer.state_dict())
    train(again, range(3, 6), 10, kept)
    for own, expected in zip(again.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(own, expected)


def test_changes_of_two_lt_sfts_add_up_and_leave_no_trace(tmp_path: Path) -> None:
    for seed, name in enumerate(("language", "task")):
        isotune.save(
            adapted(stories(), isotune.method("lt_sft", rank=1), ["q_proj"], seed=seed, size=0.3), tmp_path / name
        )
    model: Any = isotune.load(isotune.load(stories(), tmp_path / "language", "language"), tmp_path / "task", "task")
    isotune.use(model, "language", "task")
    layer = model.model.layers[0].self_attn.q_proj
    both = layer.isotune["language"].D + layer.isotune["task"].D
    torch.testing.assert_close(layer.weight, layer._parameters["weight"] + both)
    swapped = output(isotune.use(model, "task", "language"))
    torch.testing.assert_close(swapped, output(isotune.use(model, "language", "task")))
    with isotune.disabled(model):
        assert torch.equal(output(model), output(stories()))


@pytest.mark.parametrize("scores", ["learned", "greedy"])
def test_pruning_leaves_out_what_it_says_and_keeps_values_to_the_bit(scores: str, tmp_path: Path) -> None:
    model = model_with("pruning", sparsity=0.25, scores=scores, ramp=0.6)
    total, counts, masks = 8 * 6 + 6 * 5, [], []
    optimizer = None
    for k in range(10):
        optimizer = train(model, range(k, k + 1), 10, optimizer)
        masks.append(torch.cat([adapter.M.flatten() for adapter in adapters(model)]))
        counts.append(total - int(masks[-1].sum()))
    assert counts == sorted(counts)
    assert counts[-1] == counts[6] == round(0.25 * total)
    if scores == "greedy":  # what is left out stays so
        assert all(bool((later <= earlier).all()) for earlier, later in itertools.pairwise(masks))
    for adapter, layer in zip(adapters(model), (model[0], model[2]), strict=True):
        W = layer._parameters["weight"]
        assert torch.equal(layer.weight, torch.where(adapter.M, W, 0))
        assert adapter.Q.grad[~adapter.M].any() or adapter.M.all()  # weights that are left out have gradients
    isotune.save(model, tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(t.numel() for t in stored.values()) == 6 + 4
    x = torch.randn(3, 8)
    loaded = isotune.load(base(), tmp_path / "adapter", trainable=True)
    assert torch.equal(loaded(x), model(x))
    with isotune.disabled(model):
        assert torch.equal(model(x), base()(x))


def test_a_weight_of_zero_has_no_score_to_learn_and_gains_are_those_of_first_order() -> None:
    for scores, slope in (("learned", 0.25), ("greedy", 1.0)):
        model = model_with("pruning", scores=scores, start=0.0)
        layer, adapter = model[2], adapters(model)[1]
        layer._parameters["weight"].data[1, 2] = 0
        x = torch.randn(4, 8)
        model(x).square().sum().backward()
        hidden = torch.tanh(model[0](x)).detach()
        gradient = (2 * model(x)).T.detach() @ hidden
        torch.testing.assert_close(adapter.Q.grad, slope * gradient * layer._parameters["weight"])
        assert adapter.Q.grad[1, 2] == 0


def test_two_prunings_leave_out_what_either_does() -> None:
    model = base()
    for seed, name in enumerate(("a", "b")):
        isotune.adapt(model, isotune.method("pruning", sparsity=0.3), ["0", "2"], name=name, seed=0)
        isotune.after_step(move(model, seed=seed))
    isotune.use(model, "a", "b")
    a, b = (model[0].isotune[name].M for name in ("a", "b"))
    assert torch.equal(model[0].weight, torch.where(a & b, model[0]._parameters["weight"], 0))
    assert int(a.sum()) + int(model[2].isotune["a"].M.sum()) == 78 - round(0.3 * 78)
