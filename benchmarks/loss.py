"""The loss of a language model, whole and in chunks of rows: seconds of a training step, and memory beside the model.

`python -m benchmarks.loss HOW CASE DEVICE THREADS` is a process that measures one of the two.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers
from torch import nn

import isotune
from benchmarks.memory import run_child
from benchmarks.options import Options
from benchmarks.peak import peak_bytes, reset_peak
from benchmarks.timing import clock, spread
from isotune.training.tasks.chunked_loss import chunked_loss

HOWS = ("whole", "chunked")
STEPS = 4


@dataclass(frozen=True)
class LossCase:
    """A Llama of a few layers with a large vocabulary, and a batch."""

    vocabulary: int
    width: int
    layers: int
    batch: int
    tokens: int

    @property
    def title(self) -> str:
        """For the progress line."""
        return f"loss: vocabulary {self.vocabulary}, {self.batch} x {self.tokens} tokens"


def cases(options: Options) -> Iterator[LossCase]:
    """The head of SmolLM2-135M, on a GPU that of Llama-3.2-1B."""
    if options.quick:
        yield LossCase(20_000, 64, 1, 2, 512)
    elif options.cuda:
        yield LossCase(128_256, 2048, 4, 4, 1024)
    else:
        yield LossCase(49_152, 576, 4, 4, 256)


def measure(case: LossCase, options: Options) -> dict[str, Any]:
    """Run the two, taking turns, each in a process of its own."""
    runs: dict[str, list[dict[str, float]]] = {how: [] for how in HOWS}
    for _ in range(1 if options.quick else 3):
        for how in HOWS:
            arguments = [how, json.dumps(asdict(case)), options.device, str(options.threads)]
            runs[how].append(run_child("benchmarks.loss", arguments))
    figures = {how: {key: spread([run[key] for run in found]) for key in found[0]} for how, found in runs.items()}
    return {"case": asdict(case), "contenders": figures}


def steps(how: str, case: LossCase, device: str) -> dict[str, float]:
    """The fastest of some steps of HRA on all linear layers, and the peak of memory beyond what there was before."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=case.vocabulary, hidden_size=case.width, intermediate_size=8 * case.width // 3,
        num_hidden_layers=case.layers, num_attention_heads=case.width // 64, num_key_value_heads=case.width // 64,
        tie_word_embeddings=True,
    )  # fmt: skip
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    model: nn.Module = transformers.LlamaForCausalLM(config).to(device, dtype)
    isotune.adapt(model, isotune.HRA(rank=8), "all-linear", seed=0).train()
    ids = torch.randint(case.vocabulary, (case.batch, case.tokens)).to(device)
    around: AbstractContextManager[Any] = chunked_loss(model) if how == "chunked" else nullcontext(False)
    now, seconds = clock(device), []
    with around as chunked:
        assert chunked == (how == "chunked")
        for step in range(STEPS + 1):
            if step == 1:
                reset_peak(device)
                before = peak_bytes(device)
            start = now()
            model(input_ids=ids, labels=ids).loss.backward()
            model.zero_grad()
            seconds.append(now() - start)
    return {"total": min(seconds[1:]), "peak": float(peak_bytes(device) - before)}


if __name__ == "__main__":
    chosen, described, where, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    print(json.dumps(steps(chosen, LossCase(**json.loads(described)), where)))
