"""What is particular to LoCA: cosines at learned locations, their finite-difference gradients, and the schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import isotune
from isotune import Settings
from isotune.adapters.contract import Treatment
from isotune.errors import OptionError
from isotune.linalg.dct import dct_matrix
from isotune.model.rates import treatments
from isotune.sites import require_site
from laws.suite import check_law

LEARNED = {"location_steps": 60}


def loca(**options: Any) -> Settings:
    return isotune.method("loca", **options)


def build(settings: Settings, layer: nn.Module, seed: int = 0) -> Any:
    """An adapter off its start, in the layer's dtype."""
    generator = torch.Generator().manual_seed(seed)
    adapter = settings.build(require_site(layer, "layer"), generator).to(layer.weight.dtype)
    adapter.coefficients.data.normal_(generator=generator)
    return adapter


def linear(n_in: int = 7, n_out: int = 5) -> nn.Linear:
    return nn.Linear(n_in, n_out).double().requires_grad_(False)


def steps(adapter: Any, count: int) -> Any:
    with torch.no_grad():
        for _ in range(count):
            adapter.after_step(1.0)
    return adapter


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 99))
def test_change_is_the_inverse_transform_of_entries_that_add_up(n_in: int, n_out: int, seed: int) -> None:
    layer = linear(n_in, n_out)
    adapter = build(loca(n_frequency=n_in * n_out, scale=2.0), layer, seed)
    S = torch.zeros(n_out, n_in, dtype=torch.float64)
    for a, (row, col) in zip(adapter.coefficients.detach(), adapter.locations.mT, strict=True):
        S[round(float(row) * (n_out - 1)), round(float(col) * (n_in - 1))] += a
    expected = layer.weight + 2.0 * dct_matrix(n_out).mT @ S @ dct_matrix(n_in)
    torch.testing.assert_close(adapter.weight(layer.weight).detach(), expected, rtol=0, atol=1e-10)


def test_norm_of_the_change_is_that_of_the_coefficients_at_distinct_locations() -> None:
    layer = linear()
    adapter = build(loca(n_frequency=3, scale=0.5), layer)
    adapter.locations.copy_(torch.tensor([[0.0, 0.5, 1.0], [0.2, 0.2, 1.0]]))
    change = adapter.weight(layer.weight) - layer.weight
    torch.testing.assert_close(change.norm(), 0.5 * adapter.coefficients.norm())


@pytest.mark.parametrize("done", [0, 15])
@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 99))
def test_rows_and_weight_have_the_same_change_and_gradients_in_both_phases(
    done: int, n_in: int, n_out: int, seed: int
) -> None:
    adapter = steps(build(loca(n_frequency=1 + seed % (n_in * n_out), **LEARNED), linear(n_in, n_out), seed), done)
    x = torch.randn(6, n_in, dtype=torch.float64, requires_grad=True)
    rows, dense = adapter.change_of(x, n_out), x @ adapter.dense_change((n_out, n_in)).mT
    torch.testing.assert_close(rows, dense, rtol=0, atol=1e-10)
    inputs, g = (x, adapter.locations if done else adapter.coefficients), torch.randn_like(rows)
    for got, expected in zip(
        torch.autograd.grad(rows, inputs, g), torch.autograd.grad(dense, inputs, g), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("size", [0.1, 10.0])
def test_gradient_of_a_location_is_half_the_difference_of_its_neighbours_clamped(size: float) -> None:
    layer, n_out, n_in = linear(), 5, 7
    adapter = steps(build(loca(n_frequency=12, scale=2.0, **LEARNED), layer), 15)
    weights = size * torch.randn(n_out, n_in, dtype=torch.float64)
    (adapter.weight(layer.weight) * weights).sum().backward()
    K = 2.0 * dct_matrix(n_out) @ weights @ dct_matrix(n_in).mT
    rows, cols = (adapter.locations.detach() * torch.tensor([[n_out - 1], [n_in - 1]])).round().long()
    a = adapter.coefficients.detach()
    by_row = a * (K[(rows + 1).clamp(max=n_out - 1), cols] - K[(rows - 1).clamp(min=0), cols]) / 2
    by_col = a * (K[rows, (cols + 1).clamp(max=n_in - 1)] - K[rows, (cols - 1).clamp(min=0)]) / 2
    expected = torch.stack([by_row.clamp(-1, 1) * (n_out - 1), by_col.clamp(-1, 1) * (n_in - 1)])
    torch.testing.assert_close(adapter.locations.grad, expected)
    assert adapter.coefficients.grad is None
    assert (by_row.abs() > 1).any() == (size == 10.0)


@pytest.mark.parametrize(("start", "wanted"), [((4, 7), (3, 7)), ((4, 7), (5, 7)), ((4, 6), (4, 7))])
def test_location_next_to_the_right_one_moves_there(start: tuple[int, int], wanted: tuple[int, int]) -> None:
    layer, S = linear(9, 9), torch.zeros(9, 9, dtype=torch.float64)
    adapter = steps(build(loca(n_frequency=1, **LEARNED), layer), 10)
    adapter.locations.data.copy_(torch.tensor(start)[:, None] / 8)
    adapter.coefficients.data.fill_(1.0)
    S[wanted] = 1.0
    target = layer.weight + dct_matrix(9).mT @ S @ dct_matrix(9)
    optimizer = torch.optim.SGD([adapter.locations], lr=0.01)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        losses.append((adapter.weight(layer.weight) - target).square().sum())
        losses[-1].backward()
        optimizer.step()
    assert losses[0].item() == pytest.approx(2)
    assert losses[1].item() == pytest.approx(0)
    assert tuple(int(t[0]) for t in adapter.entries()[:2]) == wanted


def trained_in(adapter: Any, x: Tensor, site: Any) -> str:
    """What a backward pass reaches."""
    adapter.zero_grad()
    adapter(x, site).square().sum().backward()
    return ",".join(name for name, p in adapter.named_parameters() if p.grad is not None)


def test_schedule_gives_ten_steps_to_the_coefficients_and_twenty_to_the_locations_and_ends() -> None:
    layer = linear()
    adapter, x = build(loca(n_frequency=6, location_steps=45), layer), torch.randn(4, 7, dtype=torch.float64)
    seen = []
    for _ in range(80):
        seen.append(trained_in(adapter, x, require_site(layer, "")))
        steps(adapter, 1)
    expected = ["coefficients"] * 10 + ["locations"] * 20 + ["coefficients"] * 10 + ["locations"] * 5
    assert seen == expected + ["coefficients"] * 35


def test_what_rests_keeps_its_bits_whatever_momentum_the_optimizer_has() -> None:
    model = isotune.adapt(nn.Sequential(nn.Linear(7, 5)), loca(n_frequency=6, **LEARNED), ["0"], seed=0)
    adapter, x, goal = model[0].isotune["default"], torch.randn(9, 7), torch.randn(9, 5)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(70):
        resting = adapter.coefficients if adapter.phase == "locations" else adapter.locations
        moving = adapter.locations if adapter.phase == "locations" else adapter.coefficients
        before = resting.detach().clone(), moving.detach().clone()
        optimizer.zero_grad()
        (model(x) - goal).square().sum().backward()
        optimizer.step()
        isotune.after_step(model)
        assert torch.equal(resting, before[0])
        assert not torch.equal(moving, before[1])
    assert adapter.locations.min() >= 0
    assert adapter.locations.max() <= 1


def test_locations_stay_within_the_spectrum() -> None:
    layer = linear()
    adapter = build(loca(n_frequency=2, **LEARNED), layer)
    adapter.locations.data.copy_(torch.tensor([[-0.4, 0.5], [0.5, 1.7]]))
    outside = adapter.weight(layer.weight)
    steps(adapter, 1)
    assert torch.equal(adapter.weight(layer.weight), outside)
    assert adapter.locations.tolist() == [[0.0, 0.5], [0.5, 1.0]]


def test_schedule_goes_on_where_a_saved_adapter_stopped(tmp_path: Path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(7, 5))

    model = isotune.adapt(base(), loca(n_frequency=6, **LEARNED), ["0"], seed=0)
    steps(model[0].isotune["default"], 45)
    isotune.save(model, tmp_path)
    loaded = isotune.load(base(), tmp_path, trainable=True)
    fresh = isotune.adapt(base(), loca(n_frequency=6, **LEARNED), ["0"], seed=1)
    assert fresh[0].isotune["default"].phase == "coefficients"
    fresh.load_state_dict(model.state_dict())
    for other in (loaded, fresh):
        adapter = other[0].isotune["default"]
        assert adapter.phase == "locations"
        assert steps(adapter, 15).phase == "coefficients"
        assert int(adapter.steps) == 60


def test_fixed_locations_are_not_trained_and_learned_ones_have_a_rate_of_their_own() -> None:
    layer = nn.Linear(7, 5)
    fixed = isotune.adapt(nn.Sequential(layer), loca(n_frequency=6), ["0"])
    assert [name.rpartition(".")[2] for name, p in fixed.named_parameters() if p.requires_grad] == ["coefficients"]
    assert treatments(fixed) == {}
    learned = isotune.adapt(nn.Sequential(nn.Linear(7, 5)), loca(location_rate=0.1, **LEARNED), ["0"])
    assert treatments(learned) == {learned[0].isotune["default"].locations: Treatment(rate=0.1)}
    assert sum(row.trainable for row in isotune.describe(learned)) == 3 * 35


@pytest.mark.parametrize(
    "law",
    [
        "identity_at_start",
        "parameter_count_is_as_declared",
        "fold_is_the_forward_and_unfold_restores",
        "save_and_load_repeat_the_output",
        "base_bits_are_never_changed",
        "only_the_adapter_trains",
        "copies_and_pickles_work",
        "seeds_decide_the_start",
    ],
)
def test_laws_hold_while_locations_are_learned(law: str) -> None:
    # The others ask for a gradient of every parameter at every step, and the schedule lets half of them rest.
    check_law(type(loca()), "linear", law, st.just(loca(n_frequency=4, **LEARNED)))


@pytest.mark.parametrize("count", [1, 10, 29])
def test_a_schedule_shorter_than_a_cycle_is_refused(count: int) -> None:
    with pytest.raises(OptionError, match=rf"location_steps={count} is less than one cycle of 30.*at least 30, or 0"):
        loca(location_steps=count)
