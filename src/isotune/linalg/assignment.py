"""The linear assignment problem: pair the rows of a square matrix with its columns for the largest sum.

Shortest augmenting paths with dual prices (Jonker and Volgenant, "A Shortest Augmenting Path Algorithm for Dense and
Sparse Linear Assignment Problems", Computing 38, 1987), each step over all columns at once. It is exact. Cost: O(n²)
where the best column of every row is a different one, as for two models close to each other; O(n³) at worst.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def assignment(gain: Tensor) -> Tensor:
    """The permutation p (n, int64) for which `Σ_i gain[i, p[i]]` of a finite matrix (n, n) is largest."""
    cost = -gain.detach().cpu().double().numpy()
    n = len(cost)
    if n == 0:
        return torch.empty(0, dtype=torch.int64)
    # cost - u - v >= 0 throughout, and 0 on every pair that is matched.
    nearest = cost.argmin(axis=1)
    u, v = cost[np.arange(n), nearest], np.zeros(n)
    column_of, row_of = np.full(n, -1), np.full(n, -1)
    columns, rows = np.unique(nearest, return_index=True)
    column_of[rows], row_of[columns] = columns, rows
    for row in np.flatnonzero(column_of < 0):
        _augment(cost, u, v, column_of, row_of, int(row))
    return torch.from_numpy(column_of)


def _augment(
    cost: np.ndarray, u: np.ndarray, v: np.ndarray, column_of: np.ndarray, row_of: np.ndarray, start: int
) -> None:
    """Match the row `start`: the shortest path to a free column over matched ones (Dijkstra), and new prices."""
    n = len(cost)
    length, via = np.full(n, np.inf), np.full(n, start)
    open_length = length.copy()  # the lengths of the columns that are not settled, infinite for the others
    settled: list[int] = []
    row, lowest = start, 0.0
    while True:
        through = cost[row] - v
        through += lowest - u[row]
        shorter = through < length  # a settled column's length cannot shrink: reduced costs are not negative
        shorter[settled] = False
        length[shorter] = open_length[shorter] = through[shorter]
        via[shorter] = row
        column = int(open_length.argmin())
        lowest = length[column]
        settled.append(column)
        open_length[column] = np.inf
        if row_of[column] < 0:
            break
        row = row_of[column]
    inner = settled[:-1]
    u[start] += lowest
    u[row_of[inner]] += lowest - length[inner]
    v[inner] -= lowest - length[inner]
    while True:
        row = via[column]
        row_of[column] = row
        column_of[row], column = column, column_of[row]
        if row == start:
            return
