"""Federated training in simulation: it learns, re-factorising changes no output, and privacy is what it says."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import isotune
from isotune import LoRA
from isotune.errors import DataError, DivergedError, OptionError
from isotune.model.names import adapted_layers
from isotune.training.federated import Federated, dirichlet_split, federated_rounds
from isotune.training.privacy import epsilon
from isotune.training.refactorise import refactorise
from support import stories, tokens

ALL = {"participation": 1.0, "local_steps": 3, "batch_size": 16, "learning_rate": 0.3}


def task(count: int = 240, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Three classes of points around centres in eight dimensions."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (count,), generator=generator)
    centres = 2 * torch.randn(3, 8, generator=generator)
    return (centres[labels] + torch.randn(count, 8, generator=generator)).to(dtype), labels


def model(dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).to(dtype)
    return isotune.adapt(net, LoRA(**{"rank": 2} | options), ["0", "2"], seed=0)


def clients(count: int = 4, dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
    x, labels = task(dtype=dtype)
    return [{"x": x[own], "labels": labels[own]} for own in dirichlet_split(labels, count, 0.5, seed=1)]


def loss(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(net(batch["x"]), batch["labels"])


def run(net: nn.Module, data: list[dict[str, Tensor]] | None = None, **options: Any) -> list[Any]:
    return list(federated_rounds(net, data or clients(), loss, Federated(**ALL | options)))


def adapters(net: nn.Module) -> list[Any]:
    return [adapter for _, layer in adapted_layers(net) for adapter in layer.isotune.running()]


def accuracy(net: nn.Module) -> float:
    x, labels = task(dtype=next(net.parameters()).dtype)
    return float((net(x).argmax(-1) == labels).double().mean())


@pytest.mark.parametrize(
    "options", [{}, {"period": 3}, {"period": 0}, {"period": 0, "train_both": True}], ids=["1", "3", "ffa", "fedavg"]
)
def test_clients_with_different_classes_learn_together(options: dict[str, Any]) -> None:
    net = model(torch.float32)
    A = [adapter.A.detach().clone() for adapter in adapters(net)]
    before = accuracy(net)
    rounds = run(net, clients(dtype=torch.float32), rounds=15, **options)
    assert before < 0.6
    assert accuracy(net) > 0.9
    assert rounds[-1].loss < 0.5 * rounds[0].loss
    for adapter, old in zip(adapters(net), A, strict=True):
        if options == {"period": 0}:
            assert torch.equal(adapter.A, old)
        elif options.get("period", 1):
            torch.testing.assert_close(adapter.A @ adapter.A.mT, torch.eye(2))
        else:
            assert not torch.allclose(adapter.A, old)


def test_refactorising_leaves_the_outputs_and_everything_but_the_factors_alone() -> None:
    plain, new = model(), model()
    bits = {name: t.clone() for name, t in new.state_dict().items() if "isotune" not in name}
    run(plain, rounds=1, period=0)
    run(new, rounds=1)
    x, _ = task()
    assert not torch.allclose(adapters(plain)[0].A, adapters(new)[0].A)
    torch.testing.assert_close(new(x), plain(x), rtol=0, atol=1e-12)
    assert all(torch.equal(new.state_dict()[name], t) for name, t in bits.items())


@pytest.mark.parametrize("clip", [None, 0.5])
def test_from_an_orthonormal_a_on_it_takes_the_steps_of_ffa_lora(clip: float | None) -> None:
    def start() -> Any:
        net = model()
        for adapter in adapters(net):
            _, A = refactorise(torch.ones_like(adapter.B) + torch.eye(*adapter.B.shape), adapter.A.detach())
            adapter.A.data.copy_(A)
        return net

    every, never = start(), start()
    run(every, rounds=6, clip=clip)
    run(never, rounds=6, clip=clip, period=0)
    x, _ = task()
    assert not torch.allclose(adapters(every)[0].A, adapters(never)[0].A)
    torch.testing.assert_close(every(x), never(x), rtol=0, atol=1e-9)


def test_one_client_with_all_its_data_in_a_batch_is_plain_gradient_descent() -> None:
    x, labels = task()
    net, twin = model(), model()
    run(net, [{"x": x, "labels": labels}], rounds=2, batch_size=1000, period=0)
    own = [adapter.B for adapter in adapters(twin)]
    optimizer = torch.optim.SGD(own, lr=0.3)
    for _ in range(6):
        optimizer.zero_grad()
        loss(twin, {"x": x, "labels": labels}).backward()
        optimizer.step()
    for adapter, B in zip(adapters(net), own, strict=True):
        torch.testing.assert_close(adapter.B, B)


def test_one_step_of_all_clients_is_a_step_on_all_their_data() -> None:
    x, labels = task()
    apart, together = model(), model()
    run(apart, rounds=1, local_steps=1, batch_size=1000)
    run(together, [{"x": x, "labels": labels}], rounds=1, local_steps=1, batch_size=1000)
    torch.testing.assert_close(apart(x), together(x), rtol=0, atol=1e-12)


def step_of(net: Any, data: dict[str, Tensor], **options: Any) -> Tensor:
    """What one step with a learning rate of 1 adds to the B's, flattened."""
    settings = {"rounds": 1, "local_steps": 1, "learning_rate": 1.0, "period": 0, "batch_size": 1000}
    start = [adapter.B.detach().clone() for adapter in adapters(net)]
    run(net, [data], **settings | options)
    return torch.cat([(a.B.detach() - B).flatten() for a, B in zip(adapters(net), start, strict=True)])


def test_each_example_moves_the_sum_by_no_more_than_the_clip() -> None:
    x, labels = task(24)
    x[0] *= 100  # an outlier that would otherwise decide the step
    data = {"x": x, "labels": labels}
    clip, rows = 0.3, len(x)
    alone = [rows_of(i, data) for i in range(rows)]
    norms = torch.stack([step_of(model(), one).norm() for one in alone])
    assert norms.max() > clip
    assert norms.min() < clip
    expected = sum(step_of(model(), one) * min(1, clip / n) for one, n in zip(alone, norms, strict=True)) / rows
    torch.testing.assert_close(step_of(model(), data, clip=clip), expected)


def rows_of(i: int, data: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor[i : i + 1] for name, tensor in data.items()}


def test_noise_has_the_size_that_the_accountant_is_told() -> None:
    x, labels = task(20)
    data, options = {"x": x, "labels": labels}, {"clip": 0.5, "batch_size": 5, "noise": 40.0}
    draws = torch.stack([step_of(model(), data, seed=seed, **options) for seed in range(60)])
    # Divided by the expected number of examples; gradients, at most 0.5, hardly count.
    assert float(draws.std()) == pytest.approx(40 * 0.5 / 5, rel=0.05)
    assert abs(float(draws.mean())) < 0.2


def test_private_batches_are_drawn_independently() -> None:
    net, seen = model(), []

    def counting(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        seen.append(len(batch["x"]))
        return loss(net, batch)

    x, labels = task(50)
    options = Federated(**ALL | {"rounds": 1, "local_steps": 100, "batch_size": 5, "clip": 1.0})
    list(federated_rounds(net, [{"x": x, "labels": labels}], counting, options))
    assert set(seen) == {1}
    assert len(seen) == pytest.approx(500, rel=0.15)
    assert len(seen) != 500


def test_epsilon_is_that_of_the_client_with_most_steps_and_least_data() -> None:
    data = clients()
    found = run(model(), data, rounds=3, participation=0.5, clip=1.0, noise=2.0)
    taken = [sum(number in r.clients for r in found) for number in range(4)]
    expected = [epsilon(2.0, min(1, 16 / len(d["x"])), 3 * n, 1e-5) for d, n in zip(data, taken, strict=True)]
    assert all(len(set(r.clients)) == 2 for r in found)
    assert found[-1].epsilon == pytest.approx(max(expected))
    assert found[0].epsilon <= found[1].epsilon <= found[2].epsilon
    assert run(model(), data, rounds=1, clip=1.0)[0].epsilon is None


def test_it_learns_with_noise_too() -> None:
    net = model(torch.float32)
    (*_, last) = run(net, clients(dtype=torch.float32), rounds=15, clip=1.0, noise=0.5)
    assert accuracy(net) > 0.85
    assert math.isfinite(last.epsilon)


def test_one_seed_repeats_bit_for_bit_and_another_differs() -> None:
    def factor(seed: int) -> Tensor:
        net = model()
        run(net, rounds=2, clip=1.0, noise=1.0, participation=0.5, seed=seed)
        return adapters(net)[0].B

    assert torch.equal(factor(1), factor(1))
    assert not torch.allclose(factor(1), factor(2))


def test_language_model_trains_with_padding_and_with_clipping() -> None:
    net = isotune.adapt(stories(), LoRA(rank=2, alpha=8), "attention", seed=0)
    batch = tokens(net, rows=6)
    data = [{name: tensor[own] for name, tensor in batch.items()} for own in (slice(0, 4), slice(4, 6))]

    def own_loss(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return net(**batch, labels=labels).loss

    for clip in (None, 1.0):
        options = Federated(rounds=3, participation=1, local_steps=2, learning_rate=0.2, clip=clip)
        first, *_, last = (r.loss for r in federated_rounds(net, data, own_loss, options))
        assert last < first


def test_modules_trained_in_full_are_averaged_too() -> None:
    torch.manual_seed(0)
    net = isotune.adapt(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 3)), LoRA(rank=2), ["0"], train_also=["1"])
    before = net[1].weight.detach().clone()
    run(net, clients(dtype=torch.float32), rounds=8)
    assert not torch.allclose(net[1].weight, before)
    assert accuracy(net) > 0.9


def test_dirichlet_split_gives_each_example_to_one_client_and_its_concentration_decides_the_mixture() -> None:
    _, labels = task(900)
    shares = {}
    for concentration in (0.1, 100.0):
        parts = dirichlet_split(labels, 5, concentration)
        assert torch.cat(parts).sort().values.tolist() == list(range(900))
        largest = [int(labels[part].bincount().max()) / len(part) for part in parts]
        shares[concentration] = sum(largest) / 5
    assert shares[100.0] < 0.45 < 0.6 < shares[0.1]
    with pytest.raises(OptionError, match="leave some of 20 clients without any"):
        dirichlet_split(torch.zeros(10), 20, 0.5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Federated(noise=1.0), OptionError, "noise=1 is in units of clip; give the clip too"),
        (lambda: Federated(train_both=True), OptionError, "set period=0 for FedAvg"),
        (lambda: Federated(participation=0), OptionError, "federated: participation=0 is not usable"),
        (lambda: run(nn.Linear(8, 3)), OptionError, "has no active adapter"),
        (
            lambda: run(isotune.adapt(nn.Sequential(nn.Linear(8, 8)), isotune.HRA(), ["0"])),
            OptionError,
            "is for lora",
        ),
        (lambda: run(isotune.fold(model())), OptionError, "is folded into the weight"),
        (lambda: run(model(), [{"x": torch.ones(3), "labels": torch.ones(2)}]), DataError, "client 0 needs tensors"),
        (lambda: run(model(), [{"x": torch.ones(0, 8)}]), DataError, "of one length above zero"),
        (lambda: list(federated_rounds(model(), [], loss, Federated())), DataError, "at least one client"),
        (lambda: run(model(), learning_rate=1e200, rounds=3), DivergedError, "lower the learning rate, 1e"),
    ],
)
def test_what_cannot_be_is_refused(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_of_zero_is_refused_where_b_alone_is_trained() -> None:
    net = isotune.adapt(nn.Sequential(nn.Embedding(9, 4)), LoRA(rank=2), ["0"])
    with pytest.raises(OptionError, match="A of the adapter on '0' is zero"):
        run(net)
