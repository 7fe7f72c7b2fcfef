"""KnOTS: merging in a basis that the changes share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from isotune.linalg.change import Change, dense
from isotune.linalg.low_rank import Factored, norm
from isotune.merging.rules.dare_ties import DARETIES
from isotune.merging.rules.knots import KnOTS
from isotune.merging.rules.linear import Linear
from isotune.merging.rules.ties import TIES
from merging.drawn import factored, merge, site, tensors


def in_basis_by_svd(changes: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """U and Z_i from the SVD of the dense changes side by side."""
    U, S, Vh = torch.linalg.svd(torch.cat(changes, dim=1), full_matrices=False)
    keep = S / S[0] > 1e-9
    Z = S[keep, None] * Vh[keep]
    return U[:, keep], list(Z.split(changes[0].shape[1], dim=1))


@pytest.mark.parametrize("make", [lambda: factored(3, 12, 20, 2), lambda: tensors(3, 12, 20)])
def test_the_changes_are_the_basis_times_their_coordinates(make: Any) -> None:
    changes = make()
    U, inside = KnOTS()._in_basis(site(changes))
    torch.testing.assert_close(U.mT @ U, torch.eye(U.shape[1], dtype=U.dtype))
    for change, Z in zip(changes, inside.changes, strict=True):
        torch.testing.assert_close(U @ dense(Z), dense(change))
    rows = sum(dense(Z) @ dense(Z).mT for Z in inside.changes)
    assert isinstance(rows, Tensor)
    # S V has orthogonal rows, of length S, descending.
    torch.testing.assert_close(rows, rows.diag().diag())
    assert (rows.diag().diff() <= 0).all()


@pytest.mark.parametrize("trim", ["model", "tensor"])
def test_it_is_ties_in_the_space_of_the_dense_decomposition(trim: Any) -> None:
    sites = [factored(3, 12, 20, 2), factored(3, 30, 8, 4, seed=5)]
    bases = [in_basis_by_svd([change.dense() for change in changes]) for changes in sites]
    weights = (1.0, 0.5, 2.0)
    inside = merge(TIES(trim=trim), *(site(Z, weights, path=str(i)) for i, (_, Z) in enumerate(bases)))
    found = merge(KnOTS(trim=trim, scale=0.6), *(site(c, weights, path=str(i)) for i, c in enumerate(sites)))
    for own, (U, _), Z in zip(found, bases, inside, strict=True):
        torch.testing.assert_close(own, 0.6 * U @ Z)
    plain = merge(TIES(trim=trim, scale=0.6), *(site(c, weights, path=str(i)) for i, c in enumerate(sites)))
    assert not torch.allclose(found[0], plain[0], atol=0.1)


def test_the_mean_in_the_basis_is_the_mean() -> None:
    here = site(factored(3, 12, 20, 2), (1.0, 0.5, 2.0))
    for side in ("in", "out"):
        torch.testing.assert_close(merge(KnOTS(rule="mean", side=side), here), merge(Linear(), here))


@pytest.mark.parametrize("rule", ["ties", "mean", "dare_ties"])
@pytest.mark.parametrize("side", ["in", "out"])
def test_factored_changes_stay_factored_and_dense_ones_give_the_same(rule: Any, side: Any) -> None:
    changes = factored(3, 12, 20, 2)
    knots = KnOTS(rule=rule, side=side)
    here, there = site(changes), site([change.dense() for change in changes])
    found, other = knots.merge(here, knots.survey([here])), knots.merge(there, knots.survey([there]))
    assert isinstance(found, Factored)
    assert isinstance(other, Tensor)
    assert found.rank <= 6
    mixed = site([changes[0], changes[1].dense(), changes[2]])
    torch.testing.assert_close(found.dense(), other)
    torch.testing.assert_close(dense(knots.merge(mixed, knots.survey([mixed]))), other)


def test_rounding_does_not_count_as_a_direction() -> None:
    changes = factored(3, 12, 20, 2)
    rounded = [
        change.dense() + 1e-7 * noise for change, noise in zip(changes, tensors(3, 12, 20, seed=9), strict=True)
    ]
    torch.testing.assert_close(merge(KnOTS(), site(rounded)), merge(KnOTS(), site(changes)), rtol=0, atol=1e-5)


def test_more_rank_than_the_weight_has_room_for() -> None:
    changes = factored(3, 7, 20, 4)
    found = KnOTS(density=1.0).merge(site(changes), None)
    assert isinstance(found, Factored)
    assert found.rank == 7
    torch.testing.assert_close(merge(KnOTS(density=1.0), site(changes[:1])), changes[0].dense())


def test_transposing_the_changes_turns_the_side() -> None:
    changes = factored(3, 12, 20, 2)
    turned: list[Change] = [change.transposed for change in changes]
    torch.testing.assert_close(merge(KnOTS(side="in"), site(turned)), merge(KnOTS(), site(changes)).mT)


def test_rotating_the_outputs_rotates_the_result() -> None:
    changes = factored(3, 12, 20, 2)
    (square,) = tensors(1, 12, 12, seed=9)
    Q = torch.linalg.qr(square).Q
    rotated = merge(KnOTS(), site([change.times(left=Q) for change in changes]))
    torch.testing.assert_close(rotated, Q @ merge(KnOTS(), site(changes)))
    assert not torch.allclose(merge(TIES(), site([Q @ c.dense() for c in changes])), Q @ merge(TIES(), site(changes)))


def test_other_tensors_are_merged_as_they_are() -> None:
    biases, weights = tensors(3, 40), (1.0, 2.0, 0.5)
    bias = site(biases, weights, path="bias", matrix=False)
    weight = site(factored(3, 12, 20, 2), weights)
    found = merge(KnOTS(scale=0.5), weight, bias)
    torch.testing.assert_close(found[1], merge(TIES(trim="tensor", scale=0.5), bias))
    torch.testing.assert_close(found[0], merge(KnOTS(scale=0.5), weight))
    drawn = merge(KnOTS(rule="dare_ties"), bias)
    torch.testing.assert_close(drawn, merge(DARETIES(density=0.2), bias))


def test_draws_repeat_and_depend_on_the_seed() -> None:
    changes = factored(2, 12, 20, 2)
    one, same, other = (merge(KnOTS(rule="dare_ties"), site(changes, seed=seed)) for seed in (0, 0, 1))
    assert one.equal(same)
    assert not one.equal(other)


def test_single_precision_loses_little() -> None:
    changes = factored(3, 60, 50, 4, dtype=torch.float32)
    found = KnOTS(density=1.0).merge(site(changes[:1]), None)
    assert isinstance(found, Factored)
    assert found.B.dtype == torch.float32
    assert norm(found) == pytest.approx(norm(changes[0]), rel=1e-5)
    torch.testing.assert_close(found.dense(), changes[0].dense(), rtol=1e-4, atol=1e-4)
