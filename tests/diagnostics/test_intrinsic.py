"""Local intrinsic dimensions: near what is planted, from the same start every time, and nothing stays changed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import isotune
from isotune.diagnostics import IntrinsicDimension, intrinsic_dimension
from isotune.diagnostics.intrinsic import Projected
from isotune.errors import IsotuneError, OptionError, TargetError
from support import assert_unchanged, snapshot


class TwoParts(nn.Module):
    """One linear layer beside another, each of which reads a half of x (n, 24) and gives four outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.few, self.many, self.norm = nn.Linear(12, 4), nn.Linear(12, 4), nn.BatchNorm1d(24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return torch.cat([self.few(x[:, :12]), self.many(x[:, 12:])], dim=-1)


@pytest.fixture
def model() -> TwoParts:
    torch.manual_seed(0)
    return TwoParts().eval()


def planted(model: TwoParts, few: int, many: int) -> tuple[Tensor, Callable[[nn.Module], float]]:
    """Inputs that span so many directions of each half, and a training to random targets to the very optimum.

    Its score is the share of the targets' distance from the start that is gone, or 1 - |e|² / |e0|²; what it can be
    depends on 4 (few + many) numbers of the outputs alone.
    """
    draw = torch.Generator().manual_seed(1)
    halves = [torch.linalg.qr(torch.randn(12, k, generator=draw)).Q.mT for k in (few, many)]
    x = torch.block_diag(*halves)
    start = model(x).detach()
    # Each output's targets differ from the start for the inputs of its half alone: no bias could do that.
    mask = torch.block_diag(torch.ones(few, 4), torch.ones(many, 4))
    target = start + torch.randn(start.shape, generator=draw) * mask

    def train(model: nn.Module) -> float:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.LBFGS(trained, max_iter=100, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

        def error() -> Tensor:
            return ((model(x) - target) * mask).square().sum()

        def closure() -> Tensor:
            optimizer.zero_grad()
            (loss := error()).backward()
            return loss

        before = error().item()
        optimizer.step(closure)
        return 1 - error().item() / before

    return x, train


def of(model: TwoParts, name: str, *dimensions: int, **more: Any) -> tuple[IntrinsicDimension, float]:
    """The dimension of one part, and the share of the error that is this part's."""
    (found,) = intrinsic_dimension(model, {name: [name]}, planted(model, 1, 3)[1], dimensions, **more).values()
    return found, found.full


def test_it_is_near_the_number_of_planted_directions(model: TwoParts) -> None:
    # k directions of inputs times four outputs, and a bias does no more: of k numbers to be met D random ones meet
    # D / k in expectation, so that d_90 is 0.9 k, and all of them from D = k on.
    for name, k, dimensions in (("few", 4, range(1, 6)), ("many", 12, range(5, 14))):
        found, full = of(model, name, *dimensions)
        assert found.d is not None
        assert 0.5 * k < found.d <= k, (name, found.scores)
        assert found.parameters == 12 * 4 + 4
        shares = {D: score / full for D, score in found.scores.items()}
        assert all(share < 0.9 for D, share in shares.items() if found.d > D)
        assert list(shares) == list(range(dimensions[0], found.d + 1))


def test_from_as_many_dimensions_on_as_there_are_directions_the_score_is_the_full_one(model: TwoParts) -> None:
    found, full = of(model, "few", 4, share=1 - 1e-4)
    assert found.d == 4
    assert found.scores[4] == pytest.approx(full, rel=1e-3)


def test_nothing_of_the_model_stays_changed(model: TwoParts) -> None:
    model.train()
    model.many.requires_grad_(False)
    model(torch.randn(5, 24)).sum().backward()
    names, classes = list(model.state_dict()), [type(m) for m in model.modules()]
    before, gradients = snapshot(model), {name: p.grad for name, p in model.named_parameters()}
    parameters = dict(model.named_parameters())
    flags = {name: p.requires_grad for name, p in parameters.items()}
    held = {name: None if g is None else g.clone() for name, g in gradients.items()}
    _, train = planted(TwoParts().eval(), 1, 3)
    random = torch.get_rng_state()

    def tries(model: nn.Module) -> float:
        train(model.train())  # which moves the running statistics, too
        return float(torch.rand(()))

    intrinsic_dimension(model, {"both": ["few", "many"], "few": "few"}, tries, [3, 2], share=1)
    assert torch.equal(torch.get_rng_state(), random)
    assert_unchanged(model, before)
    assert (list(model.state_dict()), [type(m) for m in model.modules()]) == (names, classes)
    after = dict(model.named_parameters())
    assert list(after) == list(parameters)
    assert all(after[name] is p for name, p in parameters.items())
    assert {name: p.requires_grad for name, p in after.items()} == flags
    assert all(after[name].grad is g for name, g in gradients.items())
    assert all(g is None or torch.equal(g, held[name]) for name, g in gradients.items())  # type: ignore[arg-type]
    assert model.training


def test_nothing_stays_changed_where_a_training_fails(model: TwoParts) -> None:
    before, calls = snapshot(model), []

    def fails(model: nn.Module) -> float:
        calls.append([type(m) for m in model.modules()])
        for p in model.parameters():
            if p.requires_grad:
                p.data.add_(1)
        if len(calls) == 2:
            raise ValueError("no more")
        return 1.0

    with pytest.raises(ValueError, match="no more"):
        intrinsic_dimension(model, {"few": "few"}, fails, [2])
    assert_unchanged(model, before)
    assert type(model.few) is nn.Linear
    assert calls[0] != calls[1]


def test_every_training_begins_with_the_same_weights_and_the_same_seed(model: TwoParts) -> None:
    seen: list[tuple[float, Tensor, list[int]]] = []

    def watched(model: nn.Module) -> float:
        trained = [p for p in model.parameters() if p.requires_grad]
        seen.append((float(torch.rand(())), model(torch.ones(1, 24)).detach(), [p.numel() for p in trained]))
        for p in trained:
            p.data.add_(1)
        return 1.0 if len(seen) == 1 else 0.1

    with torch.no_grad():
        y = model(torch.ones(1, 24))
    found = intrinsic_dimension(model, {"few": "few"}, watched, [20, 5, 5, 60], seed=3)["few"]
    assert [sizes for _, _, sizes in seen] == [[48, 4], [5], [20]]  # and not 60, which is more than there are weights
    assert all(torch.equal(given, y) for _, given, _ in seen)
    assert len({drawn for drawn, _, _ in seen}) == 1
    assert found.d is None
    assert found.scores == {5: 0.1, 20: 0.1}


def test_one_learning_rate_moves_weights_as_far_in_few_dimensions_as_in_all(model: TwoParts) -> None:
    """A step of Adam: each weight by the rate. One of gradient descent: as in full, in expectation."""
    x = torch.randn(16, 24, generator=torch.Generator().manual_seed(5))
    W = model.few.weight.detach().clone()
    moves: dict[int, Tensor] = {}

    def step(model: Any, kind: Any) -> float:
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = kind(trained, lr=0.01)
        model(x).square().sum().backward()
        optimizer.step()
        moves[sum(p.numel() for p in trained)] = model.few.weight.detach() - W
        return 1.0 if len(moves) == 1 else 0.1

    intrinsic_dimension(model, {"few": "few"}, lambda model: step(model, torch.optim.Adam), [8, 32])
    for D in (8, 32):
        root = moves[D].square().mean().sqrt()  # of sums of D signs / √D
        assert float(root) == pytest.approx(0.01, rel=1.5 / math.sqrt(D))
    along = []
    for seed in range(100):
        moves.clear()
        intrinsic_dimension(model, {"few": "few"}, lambda model: step(model, torch.optim.SGD), [8], seed=seed)
        along.append(float((moves[8] * moves[52]).sum() / moves[52].square().sum()))
    assert sum(along) / len(along) == pytest.approx(1, abs=0.3)


def test_the_gradient_of_z_is_that_of_the_dense_projection() -> None:
    torch.manual_seed(0)
    layer, z = nn.Linear(6, 5).double(), nn.Parameter(torch.randn(4, dtype=torch.float64))
    W = layer.weight.detach()
    move = Projected(z, W, torch.Generator().manual_seed(0))
    P = torch.autograd.functional.jacobian(lambda own: _moved(move, own, W), torch.zeros_like(z)).flatten(0, 1)
    torch.testing.assert_close(P.square().sum(1), torch.ones(30, dtype=torch.float64))  # rows of length one
    torch.testing.assert_close(P.abs(), torch.full_like(P, 0.5))
    x = torch.randn(3, 6, dtype=torch.float64)
    (slow,) = torch.autograd.grad((x @ (W + (P @ z).view_as(W)).mT).square().sum(), z)
    (fast,) = torch.autograd.grad((x @ move(W).mT).square().sum(), z)
    torch.testing.assert_close(fast, slow)


def _moved(move: Projected, z: Tensor, W: Tensor) -> Tensor:
    return torch.func.functional_call(move, {"z": z}, (W,)) - W


def test_modules_in_train_also_are_trained_every_time_and_counted_never(model: TwoParts) -> None:
    before, counts = snapshot(model), []

    def train(model: nn.Module) -> float:
        counts.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
        for p in model.parameters():
            if p.requires_grad:
                p.data.add_(1)
        return 1.0

    found = intrinsic_dimension(model, {"all": ["few", "many"]}, train, [7], train_also=["many"])
    assert counts == [104, 7 + 52]
    assert found["all"].parameters == 52
    assert_unchanged(model, before)


def test_tied_and_packed_weights_move_where_they_are_used() -> None:
    torch.manual_seed(0)
    tied = nn.Module()
    tied.table, tied.head, tied.attention = nn.Embedding(9, 8), nn.Linear(8, 9, bias=False), _attention()
    tied.head.weight = tied.table.weight
    tied.forward = lambda ids: tied.head(tied.attention(tied.table(ids)))  # type: ignore[method-assign]
    ids, seen = torch.arange(4)[None], []

    def train(model: nn.Module) -> float:
        for p in model.parameters():
            if p.requires_grad:
                p.data.add_(torch.randn_like(p))
        seen.append((model.table.weight.detach(), model.head.weight.detach(), model.attention.inner.in_proj_weight))
        model.forward(ids).sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
        return 1.0

    found = intrinsic_dimension(tied, {"table": "table", "packed": ["in_proj_weight"]}, train, [6])
    assert [one.parameters for one in found.values()] == [72, 192]
    assert all(torch.equal(table, head) for table, head, _ in seen)
    assert not torch.equal(seen[0][0], seen[1][0])
    assert not torch.equal(seen[2][2], seen[3][2])
    assert tied.head.weight is tied.table.weight


def _attention() -> nn.Module:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.inner(x, x, x, need_weights=False)[0]
            return y

    return Attention()


def _always(score: float) -> Callable[[nn.Module], float]:
    def train(model: nn.Module) -> float:
        for p in model.parameters():
            if p.requires_grad:
                p.data.add_(1)
        return score

    return train


FEW = {"few": "few"}
REFUSED: list[Any] = [
    (OptionError, "no group of layers", {}, [2], {}),
    (OptionError, r"dimensions=\[\]", FEW, [], {}),
    (OptionError, r"dimensions=\[3, 0\]", FEW, [3, 0], {}),
    (OptionError, r"share=1\.5", FEW, [2], {"share": 1.5}),
    (TargetError, "match no layer", {"x": "y"}, [2], {}),
    (TargetError, "group 'few' .* has no weights to train", FEW, [2], {"train_also": ["few"]}),
]


@pytest.mark.parametrize(("error", "message", "groups", "dimensions", "more"), REFUSED)
def test_what_means_nothing_is_refused(
    model: TwoParts, error: type[Exception], message: str, groups: Any, dimensions: list[int], more: Any
) -> None:
    with pytest.raises(error, match=message):
        intrinsic_dimension(model, groups, _always(1.0), dimensions, **more)


@pytest.mark.parametrize("score", [0.0, -2.0, math.inf, math.nan])
def test_scores_of_which_there_is_no_share_are_refused(model: TwoParts, score: float) -> None:
    with pytest.raises(IsotuneError, match="trained in full, has a score of"):
        intrinsic_dimension(model, {"few": "few"}, _always(score), [2])


def test_a_training_of_other_weights_is_refused(model: TwoParts) -> None:
    with pytest.raises(IsotuneError, match="left the weights as they were"):
        intrinsic_dimension(model, {"few": "few"}, lambda model: 1.0, [2])


def test_the_weights_behind_others_parametrizations_are_those_that_move(model: TwoParts) -> None:
    parametrizations.weight_norm(model.many)
    W = model.many.weight.detach().clone()

    def train(model: Any) -> float:
        for p in model.parameters():
            if p.requires_grad:
                p.data.add_(torch.randn_like(p))
        lengths = model.many.parametrizations.weight.original0.abs().flatten()
        torch.testing.assert_close(model.many.weight.norm(dim=1), lengths)
        return 1.0

    found = intrinsic_dimension(model, {"many": "many"}, train, [2])
    assert found["many"].scores.keys() == {2}
    assert torch.equal(model.many.weight, W)
    assert not hasattr(model.many.parametrizations.weight, "parametrizations")


def test_models_with_adapters_are_refused(model: TwoParts) -> None:
    isotune.adapt(model, isotune.LoRA(rank=2), ["few"])
    with pytest.raises(IsotuneError, match="the model has adapters"):
        intrinsic_dimension(model, {"few": "few"}, _always(1.0), [2])
