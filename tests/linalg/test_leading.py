"""Leading singular triplets by products with the operator, against the dense decomposition."""

from __future__ import annotations

import pytest
import torch

import isotune.linalg.leading as leading
from isotune.linalg.leading import leading_svd
from isotune.linalg.low_rank import Factored, dense_svd
from support import minilm


def change(m: int, n: int, r: int, size: float) -> Factored:
    return Factored(size * torch.randn(m, r), torch.randn(r, n))


@pytest.fixture
def no_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: torch.Tensor) -> None:
        raise AssertionError("a dense decomposition")

    monkeypatch.setattr(leading, "dense_svd", refuse)


@pytest.mark.usefixtures("no_dense")
@pytest.mark.parametrize("layer", ["attention.self.query", "intermediate.dense", "output.dense"])
@pytest.mark.parametrize("size", [0.02, 0.3])
def test_triplets_of_a_pretrained_weight_and_a_change_are_those_of_the_dense_sum(layer: str, size: float) -> None:
    W = minilm().encoder.layer[0].get_submodule(layer).weight.detach()
    added = change(*W.shape, 4, size)
    found = leading_svd(W, added, 10, dense_svd(W).U[:, :10])
    expected = dense_svd(W.double() + added.dense().double()).first(10)
    torch.testing.assert_close(found.S.double(), expected.S, rtol=1e-5, atol=0)
    assert (found.U.double() * expected.U).sum(0).abs().min() > 1 - 1e-4
    assert (found.V.double() * expected.V).sum(0).abs().min() > 1 - 1e-4
    torch.testing.assert_close(found.U.mT @ found.U, torch.eye(10), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.V.mT @ found.V, torch.eye(10), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("no_dense")
def test_without_a_start_the_largest_are_found_too() -> None:
    W = minilm().encoder.layer[0].intermediate.dense.weight.detach()
    torch.testing.assert_close(leading_svd(W, None, 1).S, torch.linalg.svdvals(W)[:1], rtol=1e-5, atol=0)


def test_a_flat_spectrum_does_not_converge_and_is_decomposed_densely() -> None:
    W = torch.linalg.qr(torch.randn(200, 200))[0]
    torch.testing.assert_close(leading_svd(W, None, 5).S, torch.ones(5), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (1, 4), (64, 1)])
def test_small_matrices_have_at_most_so_many_triplets(shape: tuple[int, int]) -> None:
    W, added = torch.randn(shape), change(*shape, 2, 0.5)
    found = leading_svd(W, added, 10)
    assert found.U.shape == (shape[0], min(shape))
    torch.testing.assert_close(found.S, torch.linalg.svdvals(W + added.dense()), rtol=1e-5, atol=1e-6)


def test_a_matrix_of_zeros_has_values_of_zero() -> None:
    assert leading_svd(torch.zeros(128, 96), None, 3).S.tolist() == [0, 0, 0]
