"""Which task the rows of a batch are of, for methods that mix their parts by task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from isotune.adapters.mixed import Routing
from isotune.adapters.mixture.poly import PolyAdapter
from isotune.errors import IsotuneError
from isotune.model.adapted import Adapters
from isotune.model.names import adapted_layers, check_one_weight


def use_task(model: nn.Module, tasks: str | Sequence[str] | None) -> nn.Module:
    """Say of which tasks the rows of the batches that follow are.

    Args:
        model: A model with an adapter that mixes by task (`poly`), changed in place.
        tasks: One name for all rows, which makes the adapter one LoRA; or a name for each row of the batch, or for as
            many in a row as the batch has more; None takes back what was said.

    Returns:
        The same model.

    Raises:
        IsotuneError: No such adapter is in use, or it has no task of that name. The model is then as it was.
    """
    found = list(_in_use(model))
    named = [tasks] if isinstance(tasks, str) else tasks
    places = [[] if named is None else _places(adapter, named) for _, _, adapter in found]
    for (home, _, adapter), own in zip(found, places, strict=True):
        adapter.task = own[0] if len(own) == 1 else None
        adapter.routing = _rows(adapter, own) if len(own) > 1 else None
        home.inference, home.refused = None, ()
    return model


def add_task(model: nn.Module, task: str) -> nn.Module:
    """Give adapters that mix by task another task, whose mix of the skills is then all that trains (MHR-z).

    It starts from even shares; the skills and the other tasks stay as they are, bit for bit. An optimizer has to be
    made anew. Raises IsotuneError where no such adapter is in use, or the task is there already.
    """
    found = list(_in_use(model))
    for _, _, adapter in found:
        if adapter.z is None or adapter.settings.skills == 1:
            raise IsotuneError(
                "poly with router='uniform', or with one skill, has no mix of skills to learn for a task"
            )
        if task in adapter.settings.tasks:
            raise IsotuneError(f"poly has a task {task!r} already")
    for home, name, adapter in found:
        assert adapter.z is not None
        settings = adapter.settings.model_copy(update={"tasks": (*adapter.settings.tasks, task)})
        adapter.settings = home.settings[name] = settings
        adapter.requires_grad_(False)
        if adapter.added is not None:
            adapter.z = nn.Parameter(torch.cat([adapter.z, adapter.added]), requires_grad=False)
        adapter.added = nn.Parameter(torch.zeros_like(adapter.z[:1]))
    return use_task(model, task)


def _in_use(model: nn.Module) -> Iterator[tuple[Adapters, str, PolyAdapter]]:
    check_one_weight(model, "mix by task")
    some = False
    for _, layer in adapted_layers(model):
        home = layer.isotune
        for name in home.active:
            if isinstance(adapter := home[name], PolyAdapter):
                some = True
                yield home, name, adapter
    if not some:
        raise IsotuneError("no adapter in use mixes by task; the method that does is poly")


def _rows(adapter: PolyAdapter, tasks: Sequence[int]) -> Routing:
    index = torch.tensor(tasks, device=adapter.A.device)
    weights = torch.nn.functional.one_hot(index, len(adapter.settings.tasks)).float()
    return Routing(weights, index, "isotune.use_task was given the tasks of")


def _places(adapter: PolyAdapter, tasks: Sequence[str]) -> list[int]:
    if not tasks:
        raise IsotuneError("use_task was given no task; name one for all rows, or one for each")
    return [adapter.settings.place(task) for task in tasks]
