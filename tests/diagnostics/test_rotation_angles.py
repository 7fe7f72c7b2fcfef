"""Angles of rotations, found without the d x d matrix, against its eigenvalues."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import isotune
from isotune import HRA
from isotune.adapters.contract import Adapter
from isotune.diagnostics import orthogonality_error, rotation_angles
from isotune.diagnostics.rotations import rotations
from isotune.sites import require_site

OUT, IN = 24, 32


def adapter(settings: Any, size: float = 0.3) -> Adapter:
    """An adapter that is off its start."""
    site = require_site(nn.Linear(IN, OUT), "layer")
    built = settings.build(site, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in built.parameters():
            parameter += size * torch.randn(parameter.shape)
    return built.eval()


def directly(found: Adapter) -> Tensor:
    """The angles of the dense rotations' eigenvalues, each plane once, those that are not zero."""
    angles = []
    for rotation in rotations(copy.deepcopy(found).double()):
        d = IN if rotation.side == "in" else OUT
        R = rotation.rotate(torch.eye(d, dtype=torch.float64))
        values = torch.linalg.eigvals(R)
        upper = values.angle()[values.imag > 1e-9]
        reflected = int((values.real < -1 + 1e-9).sum())
        angles.append(torch.cat([upper, torch.full(((reflected + 1) // 2,), math.pi, dtype=torch.float64)]))
    together = torch.cat(angles).sort(descending=True).values
    return together[together > 1e-6]


METHODS = {
    "hra": HRA(rank=6),
    "hra, odd": HRA(rank=5, start="random"),
    "hra, one": HRA(rank=1, start="random"),
    "hra, out": HRA(rank=4, side="out"),
    "hra, anchored": HRA(rank=3, start="anchored"),
    "hra, strict": HRA(rank=3, strict=True),
    "ether": isotune.method("ether", blocks=4),
    "hoft": isotune.method("hoft", rank=4),
    "shoft": isotune.method("shoft"),
    "oft": isotune.method("oft", block=8),
    "oft, shared": isotune.method("oft", block=8, share=True),
    "boft, one factor": isotune.method("boft", block=8, factors=1),
    "boft": isotune.method("boft", block=8, factors=2),
    "boft, dense": isotune.method("boft", block=8, factors=3),
}


@pytest.mark.parametrize("name", list(METHODS))
def test_angles_are_those_of_the_dense_rotation(name: str) -> None:
    found = adapter(METHODS[name])
    angles, expected = rotation_angles(found, (OUT, IN)), directly(found)
    assert angles is not None
    assert len(expected) > 0
    torch.testing.assert_close(angles, expected, rtol=0, atol=1e-6)
    error = orthogonality_error(found, (OUT, IN))
    assert error is not None
    assert error < 1e-5


def test_pairs_of_reflections_that_cancel_turn_nothing() -> None:
    angles = rotation_angles(adapter(HRA(rank=6), size=0), (OUT, IN))
    assert angles is not None
    assert angles.tolist() == []


def test_two_reflections_turn_their_plane_by_twice_the_angle_between_them() -> None:
    found = adapter(HRA(rank=2, start="random"))
    with torch.no_grad():
        found.U.zero_()  # type: ignore[union-attr, operator]
        found.U[0, 0] = 1  # type: ignore[index]
        found.U[:2, 1] = torch.tensor([math.cos(0.4), math.sin(0.4)])  # type: ignore[index]
    angles = rotation_angles(found, (OUT, IN))
    assert angles is not None
    assert angles.tolist() == pytest.approx([0.8], abs=1e-6)


@pytest.mark.parametrize("name", ["lora", "road", "goft"])
def test_what_has_no_cheap_angles_has_none(name: str) -> None:
    assert rotation_angles(adapter(isotune.method(name)), (OUT, IN)) is None


def test_what_is_not_orthogonal_says_how_far_and_has_no_angles() -> None:
    found = adapter(isotune.method("goft", relaxed=True))
    error = orthogonality_error(found, (OUT, IN))
    assert error is not None
    assert error > 0.1
    assert rotation_angles(found, (OUT, IN)) is None
    assert orthogonality_error(adapter(isotune.method("lora")), (OUT, IN)) is None
