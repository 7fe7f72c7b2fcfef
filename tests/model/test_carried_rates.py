"""A rate that suits one model suits another: a step turns all its rotations together as far."""

from __future__ import annotations

import contextlib
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerState

import isotune
from isotune import WeightAdapter
from isotune.adapters.registry import method_names
from isotune.model.rates import treatments
from isotune.training.progress import ProgressLine, Screen

# By method options, and two others of which the rank or the size of what turns differs.
ROTATIONS: dict[str, list[dict[str, Any]]] = {
    "hra": [{}, {"rank": 2}, {"rank": 4, "start": "anchored"}, {"strict": True}],
    "hoft": [{}, {"rank": 2}],
    "shoft": [{}, {"rank": 2}],
    "ether": [{}, {"blocks": 4}],
    "ether_plus": [{}, {"blocks": 4}],
    "oft": [{}, {"block": 4}, {"share": True}],
    "boft": [{}, {"block": 4}, {"factors": 1}],
    "psoft": [{}, {"rank": 6}],
    "goft": [{}, {"relaxed": True}],
    "road": [{}, {"variant": 2}],
    "soda": [{}],
}


def layers(count: int, width: int) -> nn.Sequential:
    """Square layers, of which each is adapted and trained by itself."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(count)))


def turned(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> float:
    """How far one step turns the weights, `sqrt(Σ |W' - W|² / |W|² in)`, towards targets that want any change."""
    layers: list[Any] = list(model)
    before = [layer.weight.detach().clone() for layer in layers]
    torch.manual_seed(1)
    wanted = [(torch.randn_like(W), torch.randn_like(W)) for W in before]
    losses = [((layer.weight @ X) * Y).sum() for layer, (X, Y) in zip(layers, wanted, strict=True)]
    torch.stack(losses).sum().backward()
    optimizer.step()
    pairs = zip(layers, before, strict=True)
    far = torch.stack([((layer.weight - W).norm() / W.norm()).square() * W.shape[1] for layer, W in pairs])
    return float(far.detach().sum().sqrt())


def adapted(count: int, width: int, name: str, **options: Any) -> Any:
    """The layers with an adapter on each, in double precision."""
    targets = [str(number) for number in range(count)]
    return isotune.adapt(layers(count, width), isotune.method(name, **options), targets, seed=0).double()


def turned_by(count: int, width: int, name: str, **options: Any) -> float:
    """How far a step turns the layers in units of its rate, which is small enough for the first order."""
    model, rate = adapted(count, width, name, **options), 1e-5
    for layer in model:
        for key, parameter in layer.isotune["default"].named_parameters():
            parameter.requires_grad_(key in layer.isotune["default"].stride)
    return turned(model, torch.optim.Adam(isotune.parameter_groups(model, lr=rate), eps=1e-30)) / rate


@cache
def turned_by_default(name: str) -> float:
    """The same for wide layers and default options, with which all options are compared."""
    return turned_by(12, 384, name)


CASES = [(name, options) for name, found in ROTATIONS.items() for options in found]


@pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{n}-{o}" for n, o in CASES])
def test_a_step_turns_every_model_as_far(name: str, options: dict[str, Any]) -> None:
    found = [turned_by_default(name), turned_by(12, 64, name, **options), turned_by(48, 32, name, **options)]
    # What psoft turns is a part of the weight that differs from one width to another.
    near = 0.6 if name == "psoft" else 0.25
    assert found[1:] == pytest.approx([found[0]] * 2, rel=near)


@pytest.mark.parametrize("name", ["hra", "hoft", "shoft", "ether", "ether_plus"])
def test_a_plain_optimizer_gets_the_same_from_methods_whose_lengths_are_free(name: str) -> None:
    found = []
    for count, width in ((12, 384), (120, 64)):
        model = adapted(count, width, name)
        rotating = [p for key, p in model.named_parameters() if p.requires_grad and not key.endswith(".m")]
        found.append(turned(model, torch.optim.Adam(rotating, lr=1e-5, eps=1e-30)))
        rates = [how.rate for p, how in treatments(model).items() if any(p is own for own in rotating)]
        assert rates == pytest.approx([1] * len(rates), rel=0.15)
    assert found[1] == pytest.approx(found[0], rel=0.25)


def test_reflections_of_any_length_get_the_rate_that_suits_them(tmp_path: Path) -> None:
    model = adapted(12, 64, "hra")
    with torch.no_grad():
        for layer in model:
            layer.isotune["default"].U *= 5
    isotune.save(model, tmp_path / "longer")
    again = isotune.load(layers(12, 64).double(), tmp_path / "longer", trainable=True)
    assert [how.rate for how in treatments(again).values()] == pytest.approx([5 * math.sqrt(384 / 64)] * 12, rel=1e-3)


ADDED = ["lora", "dora", "loraplus", "pissa", "hydra", "vera", "randlora", "loha", "kadaptation", "shira", "ssf",
         "ia3", "miss", "bat", "sppara"]  # fmt: skip


@pytest.mark.parametrize("name", ADDED)
def test_a_first_step_changes_a_model_of_any_width_and_depth_by_the_same_share(name: str) -> None:
    """`|W' - W| / |W|` at the method's default options and rate; of more than twelve layers all of them together."""
    found = []
    for count, width in ((1, 384), (1, 64), (12, 64), (48, 64), (1, 768)):
        model = adapted(count, width, name)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for layer in model:
                layer.weight.normal_(std=width**-0.5, generator=generator)
        rate = isotune.method(name).learning_rate
        optimizer = torch.optim.Adam(isotune.parameter_groups(model, lr=rate), eps=1e-30)
        found.append(turned(model, optimizer) / math.sqrt(width * min(count, 12)))
    assert found[0] > 1e-4
    assert found[1:] == pytest.approx([found[0]] * 4, rel=0.25)


OTHERWISE = {
    "adalora": "of its three factors one starts at zero", "poly": "its skills stand on average",
    "delora": "the norm of the change is there at once", "loldu": "L and U of a random matrix are large",
    "pruning": "it trains nothing of its own",
}  # fmt: skip
"""Methods whose first step at the default rate is larger or smaller on the layers here."""


def on_weights() -> list[str]:
    """The methods that change the weight of a linear layer without a bias, and nothing else."""
    found = []
    for name in method_names():
        with contextlib.suppress(isotune.IsotuneError):
            if isinstance(adapted(1, 64, name)[0].isotune["default"], WeightAdapter):
                found.append(name)
    return found


@pytest.mark.parametrize("name", [name for name in on_weights() if name not in OTHERWISE])
def test_a_first_step_at_the_default_changes_a_weight_by_some_percent(name: str) -> None:
    """So that rates carry over from one method to the next, too: between 0.5 and 8 percent, in the reference."""
    model = adapted(1, 384, name)
    with torch.no_grad():
        model[0].weight.normal_(std=384**-0.5, generator=torch.Generator().manual_seed(1))
    rate = isotune.method(name).learning_rate
    optimizer = torch.optim.Adam(isotune.parameter_groups(model, lr=rate), eps=1e-30)
    assert 0.005 < turned(model, optimizer) / math.sqrt(384) < 0.08


@pytest.mark.parametrize(("count", "said"), [(12, ""), (48, "48 adapted layers change at once: their steps are")])
def test_a_run_says_by_what_its_rate_is_divided(count: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = ProgressLine(Screen())
    line.on_train_begin(None, TrainerState(max_steps=1), None, model=adapted(count, 8, "lora"))
    line.bar.stop()
    told = capsys.readouterr().err
    assert said in told
    assert ("divided by 2.00" in told) is bool(said)


def test_large_matrices_trained_in_full_take_small_steps() -> None:
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256), nn.Linear(256, 3))
    isotune.adapt(model, isotune.method("lora"), ["0"], train_also=["1", "2"], seed=0)
    found = {tuple(parameter.shape): how.rate for parameter, how in treatments(model).items()}
    assert found == {(256, 256): 32 / 256}


class SmallResNet(nn.Module):
    """A convolutional net with residuals and batch normalization, for images of 12 x 12."""

    def __init__(self, width: int = 16, blocks: int = 6, labels: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
            for _ in range(blocks)
        )
        self.head = nn.Linear(width, labels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        found: torch.Tensor = self.head(x.relu().amax((2, 3)))
        return found


def patterns(count: int, seed: int, turned: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of eight patterns in noise; `turned`, the task to adapt to, a quarter round."""
    shapes = torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(0)).sign()
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(8, (count,), generator=generator)
    images = 0.5 * torch.randn(count, 1, 12, 12, generator=generator)
    images[:, :, 3:9, 3:9] += shapes[labels]
    return images.rot90(1, (2, 3)) if turned else images, labels


@pytest.mark.parametrize("optimizer", ["parameter groups", "plain"])
def test_the_quick_starts_rate_improves_a_convolutional_net(optimizer: str) -> None:
    """HRA's default rate once brought such nets down to guessing."""
    torch.manual_seed(0)
    model, loss_of = SmallResNet(), nn.CrossEntropyLoss()
    pretraining = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(40):
        x, y = patterns(64, step, turned=False)
        loss_of(model(x), y).backward()
        pretraining.step()
        pretraining.zero_grad()
    x, y = patterns(256, 1000, turned=True)
    before = loss_of(model.eval()(x), y).item()
    isotune.adapt(model, isotune.HRA(rank=8), r"blocks\.\d\.2", seed=0)
    groups = isotune.parameter_groups(model, lr=3e-3) if optimizer == "parameter groups" else model.parameters()
    tuning = torch.optim.AdamW(groups, lr=3e-3)
    for step in range(20):
        images, labels = patterns(64, 2000 + step, turned=True)
        loss_of(model(images), labels).backward()
        tuning.step()
        tuning.zero_grad()
    assert loss_of(model(x), y).item() < 0.8 * before
