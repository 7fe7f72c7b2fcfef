"""Random numbers that are a hash of what they are for: the same bits whatever the version of Python or torch.

A key is a tuple of strings and whole numbers; SHAKE-256 (FIPS 202) makes a stream of bytes of it. There is no state:
what is drawn for one key does not depend on what was drawn before.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

Key = tuple[str | int, ...]


def permutation(n: int, key: Key) -> Tensor:
    """The numbers 0 ... n - 1 in a random order, (n) int64."""
    return _words(n, key).argsort(stable=True)


def signs(n: int, key: Key) -> Tensor:
    """n times -1 or 1, shape (n), in float64."""
    return 1 - 2 * torch.frombuffer(_stream(n, key), dtype=torch.uint8).bitwise_and(1).double()


def normal(shape: tuple[int, int], key: Key) -> Tensor:
    """Entries from N(0, 1), in float64. Their last bits are the mathematical library's."""
    whole = _words(shape[0] * shape[1], key).bitwise_and(2**53 - 1)
    return torch.special.ndtri((whole.double() + 0.5) / 2**53).reshape(shape)


def _words(n: int, key: Key) -> Tensor:
    return torch.frombuffer(_stream(8 * n, key), dtype=torch.int64)


def _stream(count: int, key: Key) -> bytearray:
    return bytearray(hashlib.shake_256(ascii(key).encode()).digest(count))
