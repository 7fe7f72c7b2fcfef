"""Beside what others ship: the same way from the same start, or the difference that is theirs."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_optimizer
import torch
from slow import followed
from torch import Tensor

from isotune.optim import Conda, Muon, NorMuon, Scion

SHAPES = pytest.mark.parametrize("shape", [(9, 4), (4, 9), (40, 6)], ids=str)


def both(ours: Any, theirs: Any, shape: tuple[int, ...], steps: int = 5) -> list[tuple[Tensor, Tensor]]:
    """The parameter after each step of both, in fp32."""
    W, gradients = torch.randn(shape), [torch.randn(shape) for _ in range(steps)]
    p, found = torch.nn.Parameter(W.clone()), []
    other = theirs([p])
    for G in gradients:
        p.grad = G.clone()
        other.step()
        found.append(p.detach().clone())
    return list(zip(followed(ours, W, gradients), found, strict=True))


@SHAPES
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("how", [None, "original", "match_rms_adamw"])
def test_torchs_muon(shape: tuple[int, int], nesterov: bool, how: Any) -> None:
    options: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1, "nesterov": nesterov, "adjust_lr_fn": how}
    # It iterates in bf16, whose rounding is a few per cent of a step.
    pairs = both(lambda p: Muon(p, **options), lambda p: torch.optim.Muon(p, **options), shape)
    far = (pairs[-1][0] - pairs[0][0]).norm()
    for ours, theirs in pairs:
        assert float((ours - theirs).norm()) < 0.05 * float(far)


def test_torchs_muon_loses_its_momentum_in_bf16_without_the_look_ahead_and_ours_does_not() -> None:
    G = torch.randn(8, 4).bfloat16()
    for make, kept in ((torch.optim.Muon, False), (Muon, True)):
        p = torch.nn.Parameter(torch.zeros(8, 4, dtype=torch.bfloat16))
        p.grad = G.clone()
        optimizer = make([p], lr=0.1, nesterov=False, ns_steps=5)  # type: ignore[operator]
        optimizer.step()
        buffer = optimizer.state[p]["momentum_buffer"]
        assert bool(torch.allclose(buffer.float(), 0.05 * G.float(), rtol=0.02)) is kept


@SHAPES
def test_pytorch_optimizers_normuon(shape: tuple[int, int]) -> None:
    groups = [{"use_muon": True, "lr": 0.05, "weight_decay": 0.1}]
    pairs = both(
        lambda p: NorMuon(p, lr=0.05, weight_decay=0.1),
        lambda p: pytorch_optimizer.NorMuon([{**groups[0], "params": p}]),
        shape,
    )
    far = (pairs[-1][0] - pairs[0][0]).norm()
    assert all(float((ours - theirs).norm()) < 0.05 * float(far) for ours, theirs in pairs)


@SHAPES
def test_pytorch_optimizers_conda(shape: tuple[int, int]) -> None:
    ours: dict[str, Any] = {"lr": 0.05, "betas": (0.9, 0.99), "scale": 0.25}
    for step, (found, theirs) in enumerate(
        both(
            lambda p: Conda(p, update_proj_gap=99, **ours),
            lambda p: pytorch_optimizer.Conda(p, update_proj_gap=99, **ours),
            shape,
        )
    ):
        torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-4, msg=f"step {step}")


def test_pytorch_optimizers_conda_cannot_be_loaded_safely_and_ours_can(tmp_path: Any) -> None:
    for make, safe in ((pytorch_optimizer.Conda, False), (Conda, True)):
        p = torch.nn.Parameter(torch.randn(6, 4))
        p.grad = torch.randn(6, 4)
        optimizer = make([p])
        optimizer.step()
        torch.save(optimizer.state_dict(), tmp_path / "state")
        if safe:
            assert torch.load(tmp_path / "state", weights_only=True)["state"]
        else:
            with pytest.raises(Exception, match="Weights only load failed"):
                torch.load(tmp_path / "state", weights_only=True)


@pytest.mark.parametrize("constrained", [True, False])
@pytest.mark.parametrize(
    ("norm", "theirs"),
    [
        ("spectral", {"norm_type": pytorch_optimizer.optimizer.scion.LMONorm.SPECTRAL}),
        ("sign", {"norm_type": pytorch_optimizer.optimizer.scion.LMONorm.SIGN, "norm_kwargs": {"normalize": True}}),
        ("row", {"norm_type": pytorch_optimizer.optimizer.scion.LMONorm.ROW, "norm_kwargs": {"normalized": True}}),
        ("column", {"norm_type": pytorch_optimizer.optimizer.scion.LMONorm.COL, "norm_kwargs": {"normalized": True}}),
    ],
)
def test_pytorch_optimizers_scion(norm: Any, theirs: dict[str, Any], constrained: bool) -> None:
    pairs = both(
        lambda p: Scion(p, lr=0.05, norm=norm, scale=2.0, unconstrained=not constrained),
        lambda p: pytorch_optimizer.SCION(p, lr=0.05, scale=2.0, constraint=constrained, **theirs),
        (9, 4),
    )
    far = (pairs[-1][0] - pairs[0][0]).norm()
    assert all(float((ours - found).norm()) < 0.05 * float(far) for ours, found in pairs)
