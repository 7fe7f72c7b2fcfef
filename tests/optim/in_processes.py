"""Run by the launcher in two processes: optimizers on replicated (DDP) and on sharded (FSDP2) parameters.

The first process prints, as JSON, how far each ends from one process alone, and how far it went.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from isotune.optim import APTS, optimizer_class

OPTIONS: dict[str, dict[str, Any]] = {
    "muon": {},
    "normuon": {},
    "trion": {"rank": 2},
    "conda": {"update_proj_gap": 2},
    "dct_adamw": {"rank": 2, "error_feedback": True},
    "auon": {},
    "scion": {},
    "adarem": {},
    "allora": {},
}
SHARING = ("muon", "normuon", "trion")
"""Those whose processes can share the work."""
STEPS = 4


def network() -> nn.Module:
    """High, wide and single matrices, of sides that two processes do not share evenly."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def rows(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a process trains on."""
    generator = torch.Generator().manual_seed(rank)
    return tuple(torch.randn(6, d, dtype=torch.float64, generator=generator) for d in (5, 3))  # type: ignore[return-value]


def trained(model: nn.Module, optimizer: Any, parts: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """A few steps on the mean over the parts."""
    for _ in range(STEPS):
        optimizer.zero_grad()
        losses = [(model(X) - Y).square().mean() for X, Y in parts]
        torch.stack(losses).mean().backward()
        optimizer.step()


def values(model: nn.Module) -> torch.Tensor:
    """All parameters, gathered."""
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return torch.cat([p.detach().flatten() for p in whole])


def main() -> None:
    """Compare the copies."""
    dist.init_process_group("gloo")
    rank, found = dist.get_rank(), {}
    start = values(network())
    for name, options in OPTIONS.items():
        alone, replicated, sharded = network(), network(), network()
        cls = optimizer_class(name)
        both = [rows(0), rows(1)]
        trained(alone, cls(alone.parameters(), lr=0.05, **options), both)

        group = {"process_group": dist.group.WORLD} if name in SHARING else {}
        ddp: Any = DistributedDataParallel(replicated)
        trained(ddp, cls(replicated.parameters(), lr=0.05, **options, **group), [rows(rank)])

        for layer in sharded:
            fully_shard(layer)
        fully_shard(sharded)
        optimizer = cls(sharded.parameters(), lr=0.05, **options)
        trained(sharded, optimizer, [rows(rank)])
        at_rest = [t for p, kept in optimizer.state.items() for t in kept.values() if t.shape == p.shape]
        found[name] = {
            "moved": float((values(alone) - start).norm()),
            "replicated": float((values(replicated) - values(alone)).norm()),
            "sharded": float((values(sharded) - values(alone)).norm()),
            "shards": len(at_rest) > 0 and all(isinstance(t, DTensor) for t in at_rest),
        }
    found["apts"] = apts(start)
    if rank == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


def apts(start: torch.Tensor) -> dict[str, Any]:
    """Two virtual workers beside two processes with one each."""

    def loss(model: nn.Module, rank: int) -> Any:
        X, Y = rows(rank)
        return lambda: (model(X) - Y).square().mean()

    alone, shared = network(), copy.deepcopy(network())
    one = APTS(alone.parameters())
    two = APTS(shared.parameters(), process_group=dist.group.WORLD)
    for _ in range(STEPS):
        one.step([loss(alone, 0), loss(alone, 1)])
        two.step([loss(shared, dist.get_rank())])
    far = float((values(shared) - values(alone)).norm())
    return {"moved": float((values(alone) - start).norm()), "replicated": far, "sharded": 0.0, "shards": True}


if __name__ == "__main__":
    main()
