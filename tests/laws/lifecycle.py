"""Laws about what happens to a model and its adapter: training, folding, saving, copying, removing."""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import isotune
from isotune.bare import bare
from isotune.checkpoint.files import TENSORS
from isotune.model.adapted import bare_state
from laws.case import Case, Host, adapter_of, move, trainable
from laws.statements import assert_close


def fold_is_the_forward_and_unfold_restores(case: Case) -> None:
    """Folding keeps the output, unfolding restores the same bits; a weight tied to the layer's is never touched."""
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        model, x = case.moved(dtype), case.input(dtype)
        weight, bits = bare(model.layer, "weight"), bits_of(model.layer)
        before = model(x).detach()
        isotune.fold(model)
        assert_close(model(x), before, tolerance)
        assert_same_bits(model.tied.weight, bits["weight"])
        isotune.unfold(model)
        assert bare(model.layer, "weight") is weight is model.tied.weight
        assert_same_state(bits_of(model.layer), bits)
        assert_same_bits(model(x), before)
        plain = isotune.fold(model, keep_base=False)
        assert type(plain.layer) is type(case.layer)
        assert_close(plain(x), before, tolerance)


def save_and_load_repeat_the_output(case: Case) -> None:
    """A saved and loaded adapter gives the same bits, and saves to the same bytes again."""
    model, x = case.moved(torch.float32), case.input(torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder, "first"), Path(folder, "second")
        isotune.save(model, first)
        loaded = isotune.load(case.base(torch.float32), first, trainable=True).eval()
        assert_same_bits(loaded(x), model(x))
        assert loaded.layer.isotune.settings["default"] == case.method
        assert [p.shape for p in trainable(loaded)] == [p.shape for p in trainable(model)]
        isotune.save(loaded, second)
        assert_same_state(load_file(first / TENSORS), load_file(second / TENSORS))
        isotune.load_weights(move(loaded, 5), first)
        assert_same_bits(loaded(x), model(x))


def base_bits_are_never_changed(case: Case) -> None:
    """Attaching, training, saving and removing leave the base as it was, bit for bit."""
    model = case.base(torch.float32)
    layer, bits, out = model.layer, bits_of(model.layer), model(case.input(torch.float32)).detach()
    case.adapt(model, "default", case.seed)
    assert_same_state(bits_of(layer), bits)
    train(model, case, steps=3)
    assert_same_state(bits_of(layer), bits)
    with tempfile.TemporaryDirectory() as folder:
        isotune.save(model, Path(folder, "adapter"))
    with isotune.disabled(model):
        assert_same_bits(model(case.input(torch.float32)), out)
    isotune.remove(model)
    assert model.layer is layer
    assert_same_state(bits_of(layer), bits)
    assert_same_bits(model(case.input(torch.float32)), out)


def only_the_adapter_trains(case: Case) -> None:
    """Nothing of the base asks for a gradient or receives one; everything trainable is the adapter's."""
    model = case.fresh(torch.float32)
    own = {id(p) for p in adapter_of(model).parameters()}
    assert trainable(model)
    assert {id(p) for p in trainable(model)} <= own
    (model(case.input(torch.float32)).square().sum() + isotune.penalty(model)).backward()
    assert all(p.grad is None for p in model.parameters() if id(p) not in own)


def every_factor_moves_within_two_steps(case: Case) -> None:
    """Two optimizer steps from the start reach every trainable tensor."""
    model = case.fresh(torch.float32)
    before = [p.detach().clone() for p in trainable(model)]
    train(model, case, steps=2)
    for parameter, old in zip(trainable(model), before, strict=True):
        assert not torch.equal(parameter, old)
        assert parameter.isfinite().all()


def copies_and_pickles_work(case: Case) -> None:
    """A deep copy and a pickle of an adapted model compute the same and are independent of it."""
    model, x = case.moved(torch.float32), case.input(torch.float32)
    expected = model(x).detach()
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(saved, weights_only=False),
    ):
        assert_same_bits(twin(x), expected)
        assert bare(twin.layer, "weight") is twin.tied.weight
        move(twin, 3)
        assert_same_bits(model(x), expected)


def seeds_decide_the_start(case: Case) -> None:
    """One seed repeats bit for bit and two seeds differ; torch's global generator is left alone."""
    state = torch.get_rng_state()
    start, same, other = (adapter_of(case.fresh(torch.float32, seed=s)).state_dict() for s in (1, 1, 2))
    assert torch.equal(state, torch.get_rng_state())
    assert_same_state(start, same)
    assert any(not torch.equal(start[name], other[name]) for name in start)


def train(model: Host, case: Case, steps: int) -> None:
    """A few steps towards a random output."""
    model.train()
    x = case.input(torch.float32)
    optimizer = torch.optim.AdamW(trainable(model), lr=0.02, weight_decay=0.0)
    with torch.no_grad():
        goal = torch.randn(model(x).shape, generator=torch.Generator().manual_seed(case.seed))
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - goal).square().sum() + isotune.penalty(model)
        loss.backward()
        optimizer.step()
        isotune.after_step(model)
    model.eval()


def bits_of(layer: nn.Module) -> dict[str, Tensor]:
    """A copy of a layer's values."""
    return {name: tensor.clone() for name, tensor in bare_state(layer).items()}


def assert_same_bits(got: Tensor, expected: Tensor) -> None:
    """Equal in dtype, shape and every bit."""
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    raw = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (got, expected)]
    assert torch.equal(*raw)


def assert_same_state(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, and the same bits under each."""
    assert got.keys() == expected.keys()
    for name in expected:
        assert_same_bits(got[name], expected[name])


LAWS = (
    fold_is_the_forward_and_unfold_restores,
    save_and_load_repeat_the_output,
    base_bits_are_never_changed,
    only_the_adapter_trains,
    every_factor_moves_within_two_steps,
    copies_and_pickles_work,
    seeds_decide_the_start,
)
