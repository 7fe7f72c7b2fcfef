"""Random matrices compared with those that PEFT draws, bit for bit, and their statistics."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from isotune.linalg.random_bases import bfloat_bases, kaiming_uniform, ternary_bases, unit_deviation


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn_by_peft(config: peft.PeftConfig) -> Any:
    """The tuner of a model with layers of 20 x 12 and 15 x 30."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(nn.Sequential(nn.Linear(12, 20), nn.Linear(30, 15)), config).base_model


def test_kaiming_matrices_are_those_of_pefts_vera() -> None:
    theirs = drawn_by_peft(peft.VeraConfig(r=7, projection_prng_key=5, target_modules=["0", "1"]))
    generator = seeded(5)
    assert torch.equal(kaiming_uniform((7, 30), generator), theirs.vera_A["default"])
    assert torch.equal(kaiming_uniform((20, 7), generator), theirs.vera_B["default"])


@pytest.mark.parametrize("sparsity", [None, 3.0, 20**0.5])
def test_bases_are_those_of_pefts_randlora(sparsity: float | None) -> None:
    kinds = {"sparse": sparsity == 3, "very_sparse": sparsity == 20**0.5}
    config = peft.RandLoraConfig(r=6, projection_prng_key=2, target_modules=["0", "1"], **kinds)
    theirs = drawn_by_peft(config)
    sizes = 30, 4, 6, 20
    A, B = bfloat_bases(*sizes, seeded(2)) if sparsity is None else ternary_bases(*sizes, sparsity, seeded(2))
    assert torch.equal(A.float(), theirs.randlora_A["default"].float())
    assert torch.equal(B.float(), theirs.randlora_B["default"].float())


@pytest.mark.parametrize("sparsity", [3.0, 8.0])
def test_ternary_entries_are_signs_with_the_given_probability(sparsity: float) -> None:
    A, B = ternary_bases(200, 4, 50, 150, sparsity, seeded(0))
    assert (A.shape, B.shape) == ((50, 1, 150), (200, 4, 50))
    for t in (A, B):
        assert len(t.unique()) == 3
        assert float((t > 0).float().mean()) == pytest.approx(1 / (2 * sparsity), abs=0.02)
        assert float((t < 0).float().mean()) == pytest.approx(1 / (2 * sparsity), abs=0.02)
        assert float(t.std()) == pytest.approx(1, abs=1e-3)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_no_vector_of_a_tiny_basis_is_zero_where_pefts_would_be_or_not_a_number(
    n_out: int, count: int, r: int, n_in: int, seed: int
) -> None:
    A, B = ternary_bases(n_out, count, r, n_in, 3.0, seeded(seed))
    assert (A != 0).any(-1).all()
    assert (B != 0).any(0).all()
    assert A.isfinite().all()
    assert B.isfinite().all()


def test_few_entries_that_lie_close_together_are_not_blown_up() -> None:
    for t in (torch.ones(3), torch.full((1, 1), -5.0), torch.tensor([0.084, 0.083])):
        torch.testing.assert_close(unit_deviation(t), 2 * t.sign(), rtol=0.02, atol=0)
    many = torch.randn(1000)
    assert torch.equal(unit_deviation(many), many / many.std())
