"""Laws about where an adapter lives: the layer keeps its place, name, class and state."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import isotune
from isotune.bare import HOME
from isotune.checkpoint.files import TENSORS
from laws.case import Case, Host, move
from laws.lifecycle import assert_same_state
from laws.statements import assert_close


def state_is_that_of_the_base_and_the_adapters_beside_it(case: Case) -> None:
    """Every tensor of the base under its name, bit for bit; once folded, the adapted weights under those names."""
    base, model, x = case.base(torch.float32), case.moved(torch.float32), case.input(torch.float32)
    before = model(x)
    assert_same_state(_without_adapters(model), base.state_dict())
    added = model.state_dict().keys() - base.state_dict().keys()
    assert added
    assert all(HOME in name.split(".") for name in added)
    isotune.fold(model)
    plain = case.base(torch.float32)
    plain.tied.weight = nn.Parameter(plain.tied.weight.clone())  # what was tied to the layer's stays as it was
    plain.load_state_dict(_without_adapters(model))
    assert_close(plain(x), before, 1e-4)


def layer_stays_what_and_where_it_is(case: Case) -> None:
    """Its class is a subclass of what it was, the tree of modules and the hooks stay; `remove` restores the class."""
    model = case.base(torch.float32)
    layer, kind, tree = model.layer, type(model.layer), dict(model.named_modules())
    own = layer.__dict__.keys() | layer._modules.keys()
    calls: list[Any] = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    case.adapt(model, "default", case.seed)
    assert model.layer is layer
    assert isinstance(layer, kind)
    now = {name: module for name, module in model.named_modules() if HOME not in name.split(".")}
    assert now.keys() == tree.keys()
    assert all(now[name] is module for name, module in tree.items())
    model(case.input(torch.float32))
    assert calls == [1]
    isotune.remove(model)
    assert type(layer) is kind
    assert layer.__dict__.keys() | layer._modules.keys() == own


def paths_are_those_of_the_base_whatever_is_around_it(case: Case) -> None:
    """Saved and loaded through wrappers of the model and of the layer, an adapter has the paths of the base."""
    model, x = case.moved(torch.float32), case.input(torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        plain, wrapped = Path(folder, "plain"), Path(folder, "wrapped")
        isotune.save(model, plain)
        expected, rows = model(x), isotune.describe(model)
        for outer in (_wrapped(model), torch.compile(model), nn.DataParallel(model)):
            assert isotune.describe(outer) == rows
            isotune.save(outer, wrapped)
            assert_same_state(load_file(wrapped / TENSORS), load_file(plain / TENSORS))
        for wrap in (_wrapped, torch.compile, nn.DataParallel):
            inner = case.base(torch.float32)
            isotune.load(wrap(inner), plain)
            assert_close(inner.eval()(x), expected, 1e-5)


def new_adapters_take_over_the_mode_of_their_layer(case: Case) -> None:
    """Put on a model in evaluation mode an adapter is in that mode, on one in training in the other."""
    for training in (True, False):
        model = case.base(torch.float32).train(training)
        isotune.adapt(model, case.method, targets=["layer"], seed=case.seed)
        assert all(module.training is training for module in model.modules())
        with tempfile.TemporaryDirectory() as folder:
            isotune.save(move(model, case.seed), Path(folder, "adapter"))
            loaded = isotune.load(case.base(torch.float32).train(training), Path(folder, "adapter"))
        assert all(module.training is training for module in loaded.modules())


def _without_adapters(model: nn.Module) -> dict[str, Tensor]:
    return {name: t for name, t in model.state_dict().items() if HOME not in name.split(".")}


def _wrapped(model: Host) -> nn.Module:
    """The model with a wrapper around its layer."""
    model.layer = checkpoint_wrapper(model.layer)
    return model


LAWS = (
    state_is_that_of_the_base_and_the_adapters_beside_it,
    layer_stays_what_and_where_it_is,
    paths_are_those_of_the_base_whatever_is_around_it,
    new_adapters_take_over_the_mode_of_their_layer,
)
