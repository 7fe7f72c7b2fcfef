"""A branch made in a test file: what holds of every adapter holds of one that stands beside a block."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import Field
from torch import Tensor, nn

import isotune
from isotune import HRA, Branch, IsotuneError, Settings
from isotune.errors import NoWeightError, TargetError
from isotune.sites import Site
from laws.case import registered
from support import assert_same_output, minilm, move, output, stories


class Bottleneck(Settings):
    """y = f(x) + U relu(D x): a narrow branch beside a block."""

    name: ClassVar[str] = "bottleneck"
    kinds: ClassVar[frozenset[str]] = frozenset({"block"})
    learning_rate: ClassVar[float] = 1e-3
    formula: ClassVar[str] = "rank * (n_in + n_out)"

    rank: int = Field(4, gt=0, description="Width of the branch.")

    def build(self, site: Site, generator: torch.Generator) -> BottleneckBranch:
        D = torch.randn(self.rank, site.in_features, generator=generator) / site.in_features**0.5
        return BottleneckBranch(D, torch.zeros(site.out_features, self.rank))

    def parameter_count(self, site: Site) -> int:
        return self.rank * (site.in_features + site.out_features)


class BottleneckBranch(Branch):
    """Holds D (r x in) and U (out x r)."""

    method = "bottleneck"

    def __init__(self, D: Tensor, U: Tensor) -> None:
        super().__init__()
        self.D, self.U = nn.Parameter(D), nn.Parameter(U)

    def change(self, v: Tensor) -> Tensor:
        return (v.to(self.D.dtype) @ self.D.mT).relu() @ self.U.mT


class BrokenBranch(BottleneckBranch):
    """A branch that forgets what else the block gives."""

    def forward(self, x: Tensor, site: Site, *args: Any, **kwargs: Any) -> Any:
        y = super().forward(x, site, *args, **kwargs)
        return y if isinstance(y, Tensor) else y[0]


MODELS = {"llama": stories, "bert": minilm}
TARGETS = {"mlp": ["mlp", "intermediate"], "attention": ["self_attn", "attention"], "blocks": "blocks"}
on_blocks = pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
on_models = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


@on_models
@on_blocks
def test_branch_beside_any_block_starts_at_the_base_moves_saves_and_leaves(
    make: Any, targets: Any, tmp_path: Path
) -> None:
    model, before = make(), output(make())
    state, modules = {k: t.clone() for k, t in model.state_dict().items()}, dict(model.named_modules())
    with registered(Bottleneck):
        isotune.adapt(model, Bottleneck(rank=3), targets, seed=0)
        assert torch.equal(output(model), before)
        assert all(torch.equal(model.state_dict()[name], t) for name, t in state.items())
        assert all(dict(model.named_modules())[name] is module for name, module in modules.items())
        moved = output(move(model))
        assert not torch.allclose(moved, before, atol=1e-4)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(output(twin), moved)
        isotune.save(model, tmp_path / "adapter")
        loaded = isotune.load(make(), tmp_path / "adapter")
        assert torch.equal(output(loaded), moved)
        assert {row.site for row in isotune.describe(loaded)} == {row.site for row in isotune.describe(model)}
    with isotune.disabled(model):
        assert torch.equal(output(model), before)
    types = {name: type(module) for name, module in make().named_modules()}
    isotune.remove(model)
    assert {name: type(module) for name, module in model.named_modules()} == types


def test_branch_and_adapters_of_the_layers_in_its_block_stack() -> None:
    model = move(isotune.adapt(stories(), HRA(rank=2), "all-linear", name="inside", seed=0))
    inside = output(model)
    isotune.adapt(model, Bottleneck(rank=3), ["mlp"], name="beside", seed=0)
    isotune.use(model, "inside", "beside")
    assert torch.equal(output(model), inside)
    both = output(move(model, seed=2))
    assert not torch.allclose(both, inside, atol=1e-4)
    mlp = model.model.layers[0].mlp
    x = torch.randn(2, 5, 64)
    branch = mlp.isotune["beside"]
    own = type(mlp).base_class.forward(mlp, x)
    assert_same_output(mlp(x), own + branch.change(x))


def test_branch_learns_and_compiles() -> None:
    model = isotune.adapt(stories(), Bottleneck(rank=3), ["mlp"], seed=0)
    ids = torch.arange(5, 25).view(2, 10)
    optimizer = torch.optim.AdamW(isotune.parameter_groups(model, lr=1e-2))
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        isotune.after_step(model)
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    mlp, x = model.model.layers[0].mlp, torch.randn(2, 3, 64)
    torch._dynamo.reset()
    assert_same_output(torch.compile(mlp, fullgraph=True, backend="aot_eager")(x), mlp(x))


def test_whatever_needs_a_weight_refuses_a_branch_by_name(tmp_path: Path) -> None:
    model = move(isotune.adapt(stories(), Bottleneck(rank=3), ["mlp"], seed=0))
    with pytest.raises(IsotuneError, match=r"mlp.*bottleneck"):
        isotune.fold(model)
    with pytest.raises(IsotuneError, match=r"mlp.*bottleneck"):
        isotune.export_lora(model, tmp_path / "lora")
    with pytest.raises(NoWeightError, match="the change that bottleneck makes is none of a weight"):
        model.model.layers[0].mlp.isotune["default"].weight(torch.eye(3))
    with pytest.raises(IsotuneError, match="no thin factors"):
        isotune.use(model, rows=["default", None])
    with pytest.raises(TargetError, match="which cannot be adapted"):
        isotune.adapt(stories(), HRA(rank=2), ["mlp"])


@pytest.mark.parametrize("kind", [BottleneckBranch, BrokenBranch])
def test_a_branch_keeps_what_else_its_block_gives(kind: type[BottleneckBranch]) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, hidden: Tensor, scale: float = 1.0) -> tuple[Tensor, float]:
            return scale * self.linear(hidden), scale

    model = isotune.adapt(nn.Sequential(Two()), Bottleneck(rank=2), ["0"], seed=0)
    model[0].isotune["default"].__class__ = kind
    move(model)
    x = torch.randn(3, 4)
    got = model[0](hidden=x, scale=2.0)
    expected = (2 * model[0].linear(x) + model[0].isotune["default"].change(x), 2.0)
    if kind is BrokenBranch:
        assert isinstance(got, Tensor)
        return
    assert_same_output(got[0], expected[0])
    assert got[1] == 2.0
