"""Every method that stands beside a block keeps its laws, on blocks of real models; each law has a broken twin."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, reject
from hypothesis import settings as profile
from torch import nn
from torch.func import functional_call

import isotune
from isotune import Adapter, Settings
from isotune.adapters.budget import total_parameters
from isotune.adapters.orthogonal.hra import HRAAdapter
from isotune.adapters.registry import BUILT_IN, method_class
from isotune.errors import IsotuneError, NoWeightError, OptionError
from isotune.model.names import adapted_layers
from isotune.sites import require_site
from laws.case import trainable
from laws.options import drawn_settings
from support import PROMPTS, Reader, assert_same_output, minilm, move, output, stories, tokens

NAMES = [name for name in BUILT_IN if "block" in method_class(name).kinds]
MODELS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "llama mlp": (stories, ["mlp"]),
    "llama attention": (stories, ["self_attn"]),
    "bert layers": (minilm, ["layer.0", "layer.3"]),
    "llama layers": (stories, ["layers.1", "layers.3"]),
    "llama stack": (stories, ["model"]),
}
ON = dict.fromkeys(NAMES, ("llama mlp", "llama attention", "bert layers"))
# Prompts need an attention, or a vocabulary.
ON["prefix"], ON["deep_prompt"] = ("llama attention", "bert layers"), ("bert layers", "llama layers")
ON["prompt"] = ("llama stack",)
Case = tuple[Settings, Callable[[], Any], list[str]]


def small(name: str) -> Settings:
    method = method_class(name)
    return method(**{str(method.size_option): 4})


@pytest.fixture(params=[(name, model) for name in NAMES for model in ON[name]], ids=lambda pair: " ".join(pair))
def case(request: pytest.FixtureRequest) -> Case:
    name, model = request.param
    return small(name), *MODELS[model]


def fresh(case: Case, dtype: torch.dtype = torch.float32) -> Any:
    method, make, targets = case
    return isotune.adapt(make().to(dtype), method, targets, seed=0)


def adapters(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, Adapter) and not isinstance(m, HRAAdapter)]


def test_it_starts_at_the_base_moves_saves_copies_and_leaves(case: Case, tmp_path: Path) -> None:
    make = case[1]
    before, model = output(make()), fresh(case).eval()
    assert torch.equal(output(model), before) == case[0].identity_at_start
    moved = output(move(model, size=0.3).eval())
    assert not torch.allclose(moved, before, atol=1e-4)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(twin), moved)
    isotune.save(model, tmp_path / "adapter")
    assert torch.equal(output(isotune.load(make(), tmp_path / "adapter").eval()), moved)
    with isotune.disabled(model):
        assert torch.equal(output(model), before)
    isotune.remove(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in make().modules()]
    assert torch.equal(output(model), before)


def test_every_parameter_moves_within_two_steps_and_counts_are_as_declared(case: Case) -> None:
    method, make, _ = case
    model = fresh(case).train()
    assert_moves(model, make)
    sites = {path: require_site(layer, path) for path, layer in adapted_layers(model)}
    assert len(sites) == len(adapters(model))
    total = sum(row.trainable for row in isotune.describe(model))
    assert total == sum(p.numel() for p in trainable(model)) == total_parameters(method, sites)


def assert_moves(model: Any, make: Callable[[], Any]) -> None:
    """Two steps reach every parameter."""
    before = [p.detach().clone() for p in trainable(model)]
    optimizer = torch.optim.AdamW(trainable(model), lr=0.02, weight_decay=0.0)
    goal = torch.randn(output(make()).shape, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        optimizer.zero_grad()
        first = model(**tokens(model))
        (first[0] - goal).square().sum().backward()
        optimizer.step()
        isotune.after_step(model)
    for parameter, old in zip(trainable(model), before, strict=True):
        assert not torch.equal(parameter, old)
        assert parameter.isfinite().all()


def test_dtypes_are_kept(case: Case) -> None:
    model = move(fresh(case, torch.bfloat16), size=0.1).eval()
    assert {p.dtype for p in trainable(model)} == {torch.float32}
    y = output(model)
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_derivatives_for_all_options(name: str) -> None:
    @profile(max_examples=8)
    @given(drawn_settings(method_class(name)))
    def hold(method: Settings) -> None:
        torch.manual_seed(0)
        block = Reader(4) if name in PROMPTS else nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5))
        try:
            model = isotune.adapt(nn.Sequential(block).double(), method, ["0"], seed=0).eval()
        except OptionError:
            reject()
        move(model, size=0.3)
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(
            lambda x, *values: functional_call(model, dict(zip(names, values, strict=True)), x),
            (x, *(p.detach().requires_grad_() for p in trainable(model))),
            fast_mode=True,
        )

    hold()


def test_it_stands_beside_adapters_of_the_layers_inside(case: Case) -> None:
    _, before, after = inside_and_beside(*case)
    assert torch.equal(after, before) == case[0].identity_at_start


@pytest.mark.parametrize(
    ("name", "model", "backend"),
    [
        *((name, ON[name][0], "eager") for name in NAMES),
        *(pytest.param(name, model, "aot_eager", marks=pytest.mark.thorough) for name in NAMES for model in ON[name]),
    ],
)
def test_it_compiles_beside_adapters_of_the_layers_inside(name: str, model: Any, backend: str) -> None:
    model, before, _ = inside_and_beside(*shallow(small(name), *MODELS[model]))
    both = output(move(model, size=0.3, seed=2))
    assert not torch.allclose(both, before, atol=1e-4)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend=backend)
    assert_same_output(compiled(**tokens(model))[0].detach(), both, 1e-4)


def inside_and_beside(
    method: Settings, make: Callable[[], Any], targets: list[str]
) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A model with LoRA in its layers and the branch beside them; its output without the branch, and with it."""
    model = isotune.adapt(make(), isotune.LoRA(rank=2), "all-linear", name="inside", seed=0)
    inside = output(move(model, size=0.1).eval())
    isotune.adapt(model, method, targets, name="beside", seed=0)
    isotune.use(model.eval(), "inside", "beside")
    return model, inside, output(model)


def shallow(method: Settings, make: Callable[[], Any], targets: list[str]) -> Case:
    """The case in a model of the layers that are named, or of the first: a compiler's time grows with each."""
    named = [int(target[-1]) for target in targets if target[-1].isdigit()]

    def cut() -> Any:
        model = make()
        stack, name = (model.model, "layers") if hasattr(model, "model") else (model.encoder, "layer")
        setattr(stack, name, nn.ModuleList(getattr(stack, name)[n] for n in named or [0]))
        return model

    return method, cut, [f"{target[:-1]}{n}" for n, target in enumerate(targets)] if named else targets


def test_whatever_needs_a_weight_refuses_it_by_name(case: Case, tmp_path: Path) -> None:
    model = move(fresh(case))
    name = case[0].name
    for ask in (isotune.fold, lambda m: isotune.export_lora(m, tmp_path / "lora"), isotune.compact):
        with pytest.raises(IsotuneError, match=name):
            ask(model)
    with pytest.raises(NoWeightError, match=name):
        adapters(model)[0].weight(torch.eye(3))
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(PROMPTS)))  # a gradient reaches prompts of zeros
def test_broken_twins_are_found(name: str) -> None:
    case = (small(name), *MODELS["llama mlp"])
    model = fresh(case).train()
    make = case[1]
    for parameter in trainable(model):  # the start from zeros alone, which two official codes have
        parameter.data.zero_()
    with pytest.raises(AssertionError):
        assert_moves(model, make)
