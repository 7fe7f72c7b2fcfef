"""How many operations a layer costs with few rows, where a GPU waits for the processor that launches them.

On a CPU these are the calls of aten that compute something; on a GPU the kernels themselves, and the time as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.contenders import LOW_PRECISION_ONLY, REFERENCE
from benchmarks.options import Options
from benchmarks.single import adapted_layer, training_step
from benchmarks.timing import Step, alternate, clock, spread

METHODS = ("lora", "hra", "oft", "dora", "miss", "pissa")
PHASES = ("forward", "backward", "inference")


@dataclass(frozen=True)
class LaunchCase:
    """A square Linear in bf16, its adapter's rank and the rows of its input."""

    d: int
    rank: int
    rows: int
    grad_input: bool = True

    @property
    def title(self) -> str:
        """For the progress line."""
        return f"launches: linear {self.d}, r={self.rank}, {self.rows} rows"


def cases(options: Options) -> Iterator[LaunchCase]:
    """As in generation, and in the smallest batches."""
    yield LaunchCase(d=4096 if options.cuda else 256, rank=32 if options.cuda else 16, rows=16)


def contenders() -> list[str]:
    """Who takes part: six methods of ours, and PEFT's LoRA in both of its modes."""
    return ["frozen", REFERENCE, LOW_PRECISION_ONLY, *(f"isotune-{method}" for method in METHODS)]


def measure(case: LaunchCase, options: Options) -> dict[str, Any]:
    """Count what every contender does in each phase, and time it."""
    torch.manual_seed(options.seed)
    layer = nn.Linear(case.d, case.d, bias=False, device=options.device, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(case.rows, case.d, generator=options.generator()).to(options.device, torch.bfloat16)
    gradient = torch.ones_like(x)
    figures: dict[str, dict[str, Any]] = {}
    steps: dict[str, Step] = {}
    for name in contenders():
        adapted = adapted_layer(name, layer, case.rank)
        figures[name] = {"launches": counts(adapted, x.clone().requires_grad_(), gradient, options.cuda)}
        steps[name] = training_step(adapted.train(), x.clone().requires_grad_(), gradient, options.device)
        steps[f"{name} at inference"] = _inference(adapted, x, options.device)
    for name, sample in alternate(steps, options.effort()).items():
        contender, _, phase = name.partition(" at ")
        figures[contender][phase or "total"] = spread(sample.phases["total"])
    return {"case": asdict(case), "contenders": figures}


def counts(layer: nn.Module, x: Tensor, gradient: Tensor, gpu: bool) -> dict[str, int]:
    """Launches of a forward, a backward, and of a forward where nothing learns."""
    counted = _kernels if gpu else _operations
    kept: list[Tensor] = []
    layer.train()(x).backward(gradient)
    forward = counted(lambda: kept.append(layer(x)))
    backward = counted(lambda: kept[-1].backward(gradient))
    layer.eval()
    with torch.no_grad():
        layer(x)
        return {"forward": forward, "backward": backward, "inference": counted(lambda: layer(x))}


def _inference(layer: nn.Module, x: Tensor, device: str) -> Step:
    now = clock(device)

    def step() -> dict[str, float]:
        layer.eval()
        with torch.no_grad():
            start = now()
            layer(x)
            end = now()
        layer.training = True  # not train(): what is kept for inference is to stay
        return {"total": end - start}

    return step


class _Operations(TorchDispatchMode):
    """Counts calls that write or make something of their own, and are no view of what they were given."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        given = {a.untyped_storage()._cdata for a in args if isinstance(a, Tensor)}
        view = isinstance(out, Tensor) and not function._schema.is_mutable and out.untyped_storage()._cdata in given
        self.count += not view and "empty" not in function._schema.name
        return out


def _operations(call: Callable[[], Any]) -> int:
    with _Operations() as seen:
        call()
    return seen.count


def _kernels(call: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())
