"""Determinants, inverses and solutions of batches: as torch's, and ending whatever the number of threads."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from isotune.linalg.factorised import det, inv, solve

SEVERAL_THREADS = """
import torch
from isotune.linalg.factorised import det, solve
torch.set_num_threads(2)
torch.manual_seed(0)
Q = torch.linalg.qr(torch.randn(2, 8, 192, 192, dtype=torch.float64))[0]
assert torch.allclose(det(Q).abs(), torch.ones(2, 8, dtype=torch.float64))
assert torch.allclose(solve(Q, Q), torch.eye(192, dtype=torch.float64).expand_as(Q))
"""


@pytest.mark.parametrize("shape", [(5, 5), (3, 5, 5), (2, 3, 80, 80), (0, 80, 80), (90, 90)])
def test_batches_give_what_each_matrix_gives(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    X, B = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    X, eye = X / shape[-1] + torch.eye(shape[-1], dtype=torch.float64), torch.eye(shape[-1], dtype=torch.float64)
    determinants = [torch.linalg.det(x) for x in X.reshape(-1, *shape[-2:])]
    assert det(X).flatten().tolist() == pytest.approx([float(d) for d in determinants])
    assert det(X).shape == shape[:-2]
    torch.testing.assert_close(X @ inv(X), eye.expand(shape))
    torch.testing.assert_close(X @ solve(X, B), B)


def test_large_batches_end_with_several_threads() -> None:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    }
    subprocess.run([sys.executable, "-c", SEVERAL_THREADS], check=True, timeout=120, env=environment)
