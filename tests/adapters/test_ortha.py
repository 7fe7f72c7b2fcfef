"""What is particular to Orthogonal Adaptation: the shared basis, its parts, and adapters that can be added."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as profile
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import isotune
from both_ways import assert_peft_loads
from isotune.adapters.low_rank.ortha import OrthA
from isotune.checkpoint.files import TENSORS
from isotune.errors import OptionError
from isotune.merging.adapters.ortha import ortha_conflicts
from isotune.sites import require_site
from support import adapted, minilm, output, stories


def build(layer: nn.Module, seed: int = 0, **options: Any) -> Any:
    return OrthA(**{"rank": 4} | options).build(require_site(layer, ""), torch.Generator().manual_seed(seed))


def rows(n_in: int, **options: Any) -> Tensor:
    """A of an adapter on a layer with that many inputs, in float64."""
    return build(nn.Linear(n_in, 60), **options).A.double()


@given(st.integers(1, 70), st.data())
def test_rows_of_a_are_orthonormal_and_those_of_other_slots_orthogonal(n_in: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(n_in, 60)))
    seed = data.draw(st.integers(0, 9))
    all_slots = [rows(n_in, rank=rank, basis_seed=seed, slot=slot) for slot in range(n_in // rank)]
    A = torch.cat(all_slots)
    torch.testing.assert_close(A @ A.mT, torch.eye(len(A), dtype=A.dtype), rtol=0, atol=1e-6)


def test_change_of_one_slot_does_nothing_to_what_another_reads() -> None:
    layer = nn.Linear(48, 20)
    one, other = (build(layer, slot=slot, alpha=6.0) for slot in (2, 7))
    for adapter in (one, other):
        adapter.B.data.normal_()
    x = torch.randn(9, 4) @ one.A  # in the span of its rows
    (B, A), (D, C) = (adapter.factors(layer.weight) for adapter in (one, other))
    assert (x @ C.mT @ D.mT).abs().max() < 1e-5
    assert (x @ A.mT @ B.mT).abs().max() > 0.1
    both = layer.weight + B @ A + D @ C
    torch.testing.assert_close(x @ both.mT, x @ one.weight(layer.weight).mT)


def test_concepts_share_about_as_many_columns_as_chance_has_it() -> None:
    sets = [set(OrthA(rank=16).columns(64, ("concept", str(i))).tolist()) for i in range(40)]
    shared = [len(a & b) for i, a in enumerate(sets) for b in sets[:i]]
    assert sum(shared) / len(shared) == pytest.approx(16 * 16 / 64, rel=0.1)
    A = rows(64, concept="a dog")
    torch.testing.assert_close(A @ A.mT, torch.eye(4, dtype=A.dtype), rtol=0, atol=1e-6)
    assert torch.equal(A, rows(64, concept="a dog", seed=5))


def test_gaussian_rows_are_of_length_one_and_orthogonal_on_average() -> None:
    n = 4000
    A, C = (rows(n, rank=20, concept=concept, construction="gaussian") for concept in ("one", "other"))
    assert float(A.var()) * n == pytest.approx(1, rel=0.02)
    cosines = A @ C.mT
    assert abs(float(cosines.mean())) < 3 / (n**0.5 * 20)
    assert float(cosines.std()) == pytest.approx(n**-0.5, rel=0.15)


def test_with_neither_slot_nor_concept_the_seed_draws_the_part() -> None:
    assert torch.equal(rows(64, seed=1), rows(64, seed=1))
    assert not torch.equal(rows(64, seed=1), rows(64, seed=2))


def test_settings_give_the_bits_of_the_first_version() -> None:
    A = build(nn.Linear(96, 5), slot=3, basis_seed=11).A
    assert hashlib.sha256(A.numpy().tobytes()).hexdigest()[:16] == "9f9d27cc2663ee98"


def test_only_b_is_trained_and_the_file_holds_the_bits_of_a(tmp_path: Path) -> None:
    model = isotune.adapt(minilm(), OrthA(rank=4, slot=1), ["query"])
    assert {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"B"}
    fresh = output(model)
    assert torch.equal(fresh, output(minilm()))
    isotune.save(model, tmp_path)
    A = build(nn.Linear(384, 384), slot=1).A
    stored = [t for name, t in load_file(tmp_path / TENSORS).items() if name.endswith("lora_A.weight")]
    assert len(stored) == 6
    assert all(torch.equal(t, A) for t in stored)


@profile(max_examples=4)
@given(
    st.integers(1, 8),
    st.floats(1, 9),
    st.booleans(),
    st.sampled_from([{}, {"slot": 2}, {"concept": "a dog"}, {"concept": "x", "construction": "gaussian"}]),
)
def test_any_drawn_adapter_means_the_same_in_peft(
    tmp_path_factory: pytest.TempPathFactory, rank: int, alpha: float, rslora: bool, part: dict[str, Any]
) -> None:
    method = OrthA(rank=rank, alpha=alpha, rslora=rslora, **part)
    folder = tmp_path_factory.mktemp("drawn")
    assert_peft_loads(stories, method, folder, targets=["q_proj", "up_proj", "down_proj"], size=0.2)


def test_adapters_of_two_slots_stack_to_the_sum_of_their_changes() -> None:
    model = adapted(minilm(), OrthA(rank=4, slot=0), ["query"])
    adapted(model, OrthA(rank=4, slot=1), ["query"], name="other", seed=1)
    isotune.use(model, "default", "other")
    layer = next(m for m in model.modules() if hasattr(m, "isotune"))
    changes = [layer.isotune[name].factors(require_site(layer, "").weight) for name in ("default", "other")]
    expected = require_site(layer, "").weight + sum(B @ A for B, A in changes)
    torch.testing.assert_close(layer.weight, expected)


def test_slot_beyond_the_layer_is_refused_with_what_to_do() -> None:
    assert build(nn.Linear(18, 9), slot=3).A.shape == (4, 18)
    message = "slot 4 of rank 4 needs 20 inputs, and the layer has 18, which are 4 slots; take a slot below 4 or"
    with pytest.raises(OptionError, match=message):
        build(nn.Linear(18, 9), slot=4)
    assert build(nn.Linear(18, 9), slot=4, construction="gaussian").A.shape == (4, 18)
    with pytest.raises(OptionError, match="rank 10 is larger than the layer"):
        build(nn.Linear(18, 9), rank=10)


def test_orthogonal_slots_have_no_conflicts_and_other_methods_are_passed_over() -> None:
    slots = {f"a{slot}": OrthA(rank=4, slot=slot) for slot in range(4)}
    assert ortha_conflicts({**slots, "plain": isotune.LoRA(rank=4)}, 16) == []


@pytest.mark.parametrize(
    ("one", "other", "n_in", "message"),
    [
        ({"slot": 1}, {"slot": 1}, 64, "a and b have the same slot, 1: they read the same inputs"),
        ({"concept": "dog"}, {"concept": "dog"}, 64, "a and b have the same concept, dog"),
        ({"slot": 1}, {"slot": 1, "rank": 6}, 64, "a and b share 2 of 4 columns of the basis"),
        ({"slot": 0}, {"slot": 1, "basis_seed": 3}, 64, "a (orthogonal, seed 0), b (orthogonal, seed 3)"),
        ({"slot": 0, "rank": 9}, {"concept": "x", "rank": 9}, 16, "their ranks add up to 18, and only 16 directions"),
        ({"slot": 0, "rank": 16}, {"concept": "x"}, 16, "a and b share 4 of 4 columns of the basis"),
        ({"slot": 0}, {}, 64, "on average they share 0.25 columns"),
        (
            {"concept": "x", "construction": "gaussian"},
            {"concept": "y", "construction": "gaussian"},
            100,
            "orthogonal only on average (to about 0.1)",
        ),
    ],
)
def test_conflicts_are_named(one: dict[str, Any], other: dict[str, Any], n_in: int, message: str) -> None:
    settings = {name: OrthA(**{"rank": 4} | options) for name, options in (("a", one), ("b", other))}
    assert message in "; ".join(ortha_conflicts(settings, n_in))
