"""Run by the launcher in several processes: train adapted models sharded (FSDP2), replicated (DDP) and as they are.

Of each method, given as JSON, the first process prints a line: the largest difference of their losses, and of their
adapters after a few steps.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import isotune
from isotune.checkpoint.files import TENSORS

STEPS = 3


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, gathered from its shards."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def trained(model: Any, batches: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The losses of a few SGD steps on the same batches, and the adapter's tensors after them."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for batch in batches:
        loss = model(input_ids=batch, labels=batch).loss + isotune.penalty(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses), {n: whole(p.detach()) for n, p in model.named_parameters() if p.requires_grad}


def compare(method: dict[str, Any]) -> None:
    """Compare the copies of a model with this method."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32
    )
    base = LlamaForCausalLM(config)
    model = isotune.adapt(copy.deepcopy(base), isotune.method(**method), "all-linear", seed=0)
    alone: Any = copy.deepcopy(model)
    replicated = DistributedDataParallel(copy.deepcopy(model))
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    assert any(isinstance(p, DTensor) for p in model.parameters())
    # Every process sees the same batch, so that the mean over processes is the gradient of one.
    batch = torch.randint(0, 32, (2, 12), generator=torch.Generator().manual_seed(1))
    batches = batch.expand(STEPS, -1, -1)
    losses, adapter = trained(model, batches)
    expected_losses, expected = trained(alone, batches)
    replicated_losses, _ = trained(replicated, batches)
    assert adapter.keys() == expected.keys()
    with tempfile.TemporaryDirectory() as folder:
        folders = [isotune.save(m, Path(folder, str(i))) for i, m in enumerate((alone, model, replicated))]
        saved, *others = (load_file(path / TENSORS) for path in folders)
        loaded = isotune.load(DistributedDataParallel(base), folders[2]).module
    for other in others:
        assert other.keys() == saved.keys()
        assert all(torch.allclose(t, saved[name], atol=1e-5) for name, t in other.items())
    with torch.no_grad():
        assert torch.equal(loaded(batch).logits, replicated.module.eval()(batch).logits)
    worst = max(float((adapter[name] - expected[name]).abs().max()) for name in expected)
    moved = float(expected_losses[0] - expected_losses[-1])
    if dist.get_rank() == 0:
        difference = max(float((one - expected_losses).abs().max()) for one in (losses, replicated_losses))
        print(json.dumps({"losses": difference, "adapter": worst, "moved": moved}), flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for method in sys.argv[1:]:
        compare(json.loads(method))
    dist.destroy_process_group()
