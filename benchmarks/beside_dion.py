"""`python -m benchmarks.beside_dion path/to/dion`: our Muon and NorMuon beside those of microsoft/dion, step by step.

The path is a clone of the repository. On three shapes, ten steps from one start with one sequence of gradients, both
with exact polar factors, so that what is compared is momentum, look ahead, normalisation, weight decay and the factor
for the shape. Printed: how far the parameters end from each other, as a share of how far they went; exit code 1 where
that is more than the rounding of bf16, in which that repository hands its momentum on.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isotune.optim import Muon, NorMuon

SHAPES = ((16, 64), (64, 16), (48, 48))
STEPS = 10
RATE, DECAY = 0.02, 0.1
ROUNDING = 2**-8


def main() -> None:
    """Print a line for each optimizer, setting and shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", type=Path, help="a clone of microsoft/dion")
    repository = parser.parse_args().repository
    if not (repository / "dion" / "normuon.py").exists():
        raise SystemExit(f"{repository} is no clone of microsoft/dion: it has no dion/normuon.py")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # its compiled pieces, as they are written
    sys.path.insert(0, str(repository))
    theirs = import_module("dion")
    worst = 0.0
    for name, ours, other in (("Muon", Muon, theirs.Muon), ("NorMuon", NorMuon, theirs.NorMuon)):
        for nesterov in (True, False):
            for how, its in (("spectral", "spectral_norm"), ("match_rms_adamw", "rms_norm")):
                both = {"lr": RATE, "weight_decay": DECAY, "nesterov": nesterov}
                own = partial(ours, **both, adjust_lr_fn=how, method="svd")
                its_own = partial(other, **both, adjust_lr=its, newton_schulz_func=polar)
                for shape in SHAPES:
                    worst = max(worst, far := difference(shape, own, its_own))
                    print(f"{name:8} nesterov={nesterov!s:5} {its!s:14} {shape[0]:3} x {shape[1]:<3} {far:.1e}")
    sys.exit(worst > ROUNDING)


def difference(shape: tuple[int, int], ours: Callable[[Any], Any], theirs: Callable[[Any], Any]) -> float:
    """The distance of the two ends, relative to the way from the start."""
    generator = torch.Generator().manual_seed(0)
    W, gradients = torch.randn(shape, generator=generator), torch.randn(STEPS, *shape, generator=generator)
    ends = []
    for make in (ours, theirs):
        p = torch.nn.Parameter(W.clone())
        optimizer = make([p])
        for G in gradients:
            p.grad = G.clone()
            optimizer.step()
        ends.append(p.detach())
    return float((ends[0] - ends[1]).norm() / (ends[0] - W).norm())


def polar(G: Tensor, epsilon: float = 0.0) -> Tensor:  # noqa: ARG001
    """The nearest matrix with orthonormal rows or columns."""
    U, _, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    return (U @ Vh).to(G.dtype)


if __name__ == "__main__":
    main()
