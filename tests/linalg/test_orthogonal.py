"""The calculus of orthogonal matrices, against planes turned by known angles."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from isotune.linalg.cayley import cayley, inverse_cayley
from isotune.linalg.householder import dense_reflections
from isotune.linalg.orthogonal import log_orthogonal, mean, nearest_orthogonal, power, reflections


def eye(k: int) -> Tensor:
    return torch.eye(k, dtype=torch.float64)


def basis(k: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(k, k, generator=generator, dtype=torch.float64))[0]


def turned(angles: Sequence[float], k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A rotation by these angles in orthogonal planes of k dimensions, and its logarithm."""
    rotation, log = eye(k), torch.zeros(k, k, dtype=torch.float64)
    for i, angle in enumerate(angles):
        plane = slice(2 * i, 2 * i + 2)
        c, s = math.cos(angle), math.sin(angle)
        rotation[plane, plane] = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
        log[plane, plane] = torch.tensor([[0, -angle], [angle, 0]], dtype=torch.float64)
    V = basis(k, seed)
    return V @ rotation @ V.mT, V @ log @ V.mT


def near(angle: float, count: int, k: int, seed: int) -> list[Tensor]:
    """Rotations at random around a common one, in no common planes, by angles up to `angle`."""
    generator = torch.Generator().manual_seed(seed)
    centre = basis(k, seed)
    skew = torch.randn(count, k, k, generator=generator, dtype=torch.float64)
    skew = skew - skew.mT
    skew = angle * skew / torch.linalg.matrix_norm(skew, 2)[:, None, None]
    return list(centre @ torch.linalg.matrix_exp(skew))


@pytest.mark.parametrize(
    "angles",
    [
        (0.3, 1.2, 2.9),
        (0.7, 0.7, 0.7),  # planes that are not unique
        (1e-9, 1.0),
        (3.0, 3.0, -3.0, 1e-3),
        (math.pi / 2, math.pi / 2),
        (),
    ],
)
def test_logarithm_of_known_angles(angles: tuple[float, ...]) -> None:
    R, log = turned(angles, 9)
    found = log_orthogonal(R)
    torch.testing.assert_close(found, log, rtol=0, atol=1e-12)
    assert found.equal(-found.mT)
    torch.testing.assert_close(torch.linalg.matrix_exp(found), R, rtol=0, atol=1e-12)


@pytest.mark.parametrize("distance", [1e-2, 1e-4, 1e-6])
def test_logarithm_near_pi_is_as_accurate_as_the_problem_allows(distance: float) -> None:
    R, log = turned((math.pi - distance, 0.5, math.pi - 2 * distance, 2.0), 9)
    found = log_orthogonal(R)
    assert (found - log).abs().max() <= 20 * torch.finfo(torch.float64).eps / distance
    assert (torch.linalg.matrix_exp(found) - R).abs().max() <= 20 * torch.finfo(torch.float64).eps / distance


@pytest.mark.parametrize("size", [1e-3, 1e-8, 1e-12, 1e-200])
def test_logarithm_near_the_identity_is_relative_to_the_difference(size: float) -> None:
    skew = torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    log = size * (skew - skew.mT)
    R = torch.linalg.matrix_exp(log)
    # exp's own rounding on the diagonal is of the order of eps, and does not reach the entries beside it.
    assert (log_orthogonal(R) - log).abs().max() <= 1e-12 * size


def test_logarithm_of_a_batch_is_that_of_each() -> None:
    R = torch.stack([turned((0.1 * i, 0.5), 5, seed=i)[0] for i in range(6)]).view(2, 3, 5, 5)
    logs = log_orthogonal(R)
    for i, j in itertools.product(range(2), range(3)):
        torch.testing.assert_close(logs[i, j], log_orthogonal(R[i, j]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("R", [turned((math.pi, 0.3), 5)[0], dense_reflections(basis(4)[:, :1]), -eye(3)])
def test_no_logarithm_at_the_eigenvalue_minus_one(R: Tensor) -> None:
    with pytest.raises(ValueError, match="eigenvalue -1"):
        log_orthogonal(R)
    with pytest.raises(ValueError, match="eigenvalue -1"):
        power(R, 0.5)


def test_powers_multiply_the_angles() -> None:
    R, _ = turned((0.3, 1.1), 5)
    for w in (0.5, 2.0, -1.0, 0.0, 2.5, -0.3):
        torch.testing.assert_close(power(R, w), turned((0.3 * w, 1.1 * w), 5)[0], rtol=0, atol=1e-12)
    whole = dense_reflections(basis(5)[:, :1])
    assert power(whole, 2.0).sub(eye(5)).abs().max() < 1e-12  # whole numbers need no logarithm
    torch.testing.assert_close(power(whole, -3.0), whole, rtol=0, atol=1e-12)


def test_mean_in_common_planes_is_the_mean_angle() -> None:
    rotations = [turned(angles, 6)[0] for angles in ((0.2, -1.0), (0.8, 0.5), (1.1, 0.4))]
    found = mean(rotations, (0.5, 0.3, 0.2))
    torch.testing.assert_close(found, turned((0.56, -0.27), 6)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("angle", "k"), [(0.1, 4), (1.0, 7), (1.5, 12)])
def test_the_gradient_vanishes_at_the_mean(angle: float, k: int) -> None:
    rotations, w = near(angle, 4, k, seed=k), (0.1, 0.4, 0.2, 0.3)
    M = mean(rotations, w)
    assert (M.mT @ M - eye(k)).abs().max() < 1e-12
    gradient = sum(wi * log_orthogonal(M.mT @ R) for wi, R in zip(w, rotations, strict=True))
    assert gradient.abs().max() < 1e-12


def test_mean_is_moved_along_inverted_and_does_not_know_the_order() -> None:
    rotations, w = near(1.2, 3, 6, seed=2), (0.5, 0.2, 0.3)
    M = mean(rotations, w)
    L, P = basis(6, 3), basis(6, 4)
    torch.testing.assert_close(mean([L @ R @ P for R in rotations], w), L @ M @ P, rtol=0, atol=1e-12)
    torch.testing.assert_close(mean([R.mT for R in rotations], w), M.mT, rtol=0, atol=1e-12)
    for order in itertools.permutations(range(3)):
        found = mean([rotations[i] for i in order], [w[i] for i in order])
        torch.testing.assert_close(found, M, rtol=0, atol=1e-12)


def test_mean_of_two_is_on_the_geodesic_and_also_where_the_determinant_is_minus_one() -> None:
    flip = dense_reflections(basis(5, 9)[:, :1])
    for first, second in (near(1.4, 2, 5, seed=1), [R @ flip for R in near(1.4, 2, 5, seed=1)]):
        expected = first @ power(first.mT @ second, 0.7)
        torch.testing.assert_close(mean([first, second], (0.3, 0.7)), expected, rtol=0, atol=1e-12)


def test_the_mean_of_far_rotations_is_the_near_one_of_two_stationary_points() -> None:
    R, _ = turned((2.5,), 2)
    torch.testing.assert_close(mean([R, R.mT], (0.5, 0.5)), -eye(2), rtol=0, atol=1e-12)
    near_one, _ = turned((1.5,), 2)
    torch.testing.assert_close(mean([near_one, near_one.mT], (0.5, 0.5)), eye(2), rtol=0, atol=1e-12)


def test_the_mean_of_reflections_has_their_determinant() -> None:
    # Their sum is nearest to the identity, which is not one of them.
    first = basis(3, 1)[:, :1]
    tilted = [first + 1.2 * v for v in basis(3, 1)[:, 1:].mT[:, :, None] for v in (v, -v)]
    M = mean([dense_reflections(u) for u in [first, *tilted]], (0.2,) * 5)
    torch.testing.assert_close(M, dense_reflections(first), rtol=0, atol=1e-12)


def test_mean_says_why_there_is_none() -> None:
    R, _ = turned((0.5,), 4)
    opposite, _ = turned((0.5 + math.pi,), 4)
    with pytest.raises(ValueError, match="no one orthogonal matrix nearest"):
        mean([R, opposite], (0.5, 0.5))
    with pytest.raises(ValueError, match="determinant 1 and some -1"):
        mean([R, dense_reflections(basis(4)[:, :3])], (0.5, 0.5))
    with pytest.raises(ValueError, match="no convergence in 1 steps"):
        mean(near(1.2, 3, 6, seed=2), (0.5, 0.2, 0.3), steps=1)
    with pytest.raises(ValueError, match="180 degrees"):
        mean([R, R, opposite], (0.3, 0.3, 0.4))


@pytest.mark.parametrize("count", [0, 1, 2, 5, 8])
def test_reflections_give_the_matrix_in_the_least_number(count: int) -> None:
    U = torch.randn(8, count, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    R = dense_reflections(U)
    found = reflections(R)
    assert found.shape == (8, count)
    torch.testing.assert_close(torch.linalg.vector_norm(found, dim=0), torch.ones(count, dtype=torch.float64))
    torch.testing.assert_close(dense_reflections(found), R, rtol=0, atol=1e-12)


@pytest.mark.parametrize("angle", [1e-3, 1e-6, 1e-9, 1e-12, math.pi, math.pi - 1e-9])
def test_reflections_of_angles_near_zero_and_pi(angle: float) -> None:
    R, _ = turned((angle, 1.0, angle / 3), 8)
    torch.testing.assert_close(dense_reflections(reflections(R)), R, rtol=0, atol=1e-12)


def test_reflections_of_diagonal_signs() -> None:
    R = torch.diag(torch.tensor([1.0, -1, 1, -1, -1], dtype=torch.float64))
    found = reflections(R)
    assert found.shape == (5, 3)
    torch.testing.assert_close(dense_reflections(found), R, rtol=0, atol=1e-12)


def test_nearest_orthogonal_is_no_further_than_any_other() -> None:
    X = torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    Q = nearest_orthogonal(X)
    torch.testing.assert_close(Q.mT @ Q, eye(5).expand(3, 5, 5), rtol=0, atol=1e-12)
    for seed in range(20):
        assert ((X - basis(5, seed)).norm(dim=(1, 2)) >= (X - Q).norm(dim=(1, 2))).all()


def test_inverse_cayley_undoes_cayley() -> None:
    Q = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    Q = Q - Q.mT
    found = inverse_cayley(cayley(Q))
    torch.testing.assert_close(found, Q, rtol=0, atol=1e-11)
    assert found.equal(-found.mT)
    with pytest.raises(ValueError, match="eigenvalue -1"):
        inverse_cayley(turned((math.pi, 1.0), 4)[0])
