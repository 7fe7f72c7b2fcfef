"""The two examples on a ResNet-20: on images of noise they go on where they were; their pages show their results."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

EXAMPLES, DOCS = (Path(__file__).parents[2] / name for name in ("examples", "docs"))


@pytest.fixture
def script(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    folder, name = request.param
    monkeypatch.setattr(sys, "path", [str(EXAMPLES / folder), *sys.path])
    threads = torch.get_num_threads()
    module = importlib.import_module(name)
    monkeypatch.setattr(module.resnet20, "VALIDATION", 20)
    yield module
    torch.set_num_threads(threads)
    del sys.modules[name]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Nine images to train on, two to validate and one to test for each of ten classes."""
    draw = np.random.default_rng(0)
    for part, count in (("train", 9), ("test", 1)):
        for label in range(10):
            folder = tmp_path / part / str(label)
            folder.mkdir(parents=True)
            for k in range(count):
                Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{k}.png")
    return tmp_path


def run(script: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    script.main()


@pytest.mark.parametrize(
    ("script", "options", "contenders"),
    [
        (
            ("compare-convolutions", "compare_convolutions"),
            ["--only", "frozen base", "ssf"],
            ["frozen base", "ssf"],
        ),
        (
            ("prune-channels", "prune_channels"),
            ["--pruned", 0.5, "--factors", 1, 2, "--only", "none", "SPPaRA and batch norms"],
            ["none", "SPPaRA and batch norms"],
        ),
    ],
    indirect=["script"],
    ids=["compare", "prune"],
)
def test_a_search_is_written_down_and_goes_on_where_it_was(
    script: ModuleType,
    options: list[object],
    contenders: list[str],
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if hasattr(script, "FACTORS"):
        monkeypatch.setattr(script, "FACTORS", (1, 2))
    log = tmp_path / "runs" / "results.jsonl"
    asked = [images, "--seeds", 2, "--epochs", 1, "--output", log, *options]
    run(script, monkeypatch, *asked)
    written, shown = log.read_text(), capsys.readouterr().out
    lines = [json.loads(line) for line in written.splitlines()]

    assert all(any(f"| {name} |" in row for row in shown.splitlines()) for name in contenders)
    single = {name for name in (line["name"] for line in lines) if "frozen" in name or "none" in name}
    for name in {line["name"] for line in lines}:
        own = [line for line in lines if line["name"] == name]
        assert [line["seed"] for line in own] == ([1, 2] if name in single else [0, 0, 1, 2])
        trials = [line for line in own if line["seed"] == 0]
        assert not any("test" in line for line in trials)  # a rate is chosen without a look at the test images
        best = max((line["validation"] for line in trials), default=None)
        chosen = next((line["rate"] for line in trials if line["validation"] == best), 0.0)
        assert {line["rate"] for line in own if line["seed"]} == {chosen}

    log.write_text("".join(written.splitlines(keepends=True)[:-1]))  # as if it had been stopped before the last run
    run(script, monkeypatch, *asked)
    timeless = [{**json.loads(line), "seconds": 0} for line in log.read_text().splitlines()]
    assert timeless == [{**line, "seconds": 0} for line in lines]
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize("script", [("compare-convolutions", "compare_convolutions")], indirect=True)
def test_inverted_colours_are_one_minus_the_colours(script: ModuleType) -> None:
    mean, deviation = (torch.tensor(v)[:, None, None] for v in (script.resnet20.MEAN, script.resnet20.DEVIATION))
    colours = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    images, classes = script.inverted(((colours - mean) / deviation, torch.tensor([3, 5])))
    assert torch.allclose(images * deviation + mean, 1 - colours, atol=1e-6)
    assert classes.tolist() == [3, 5]


@pytest.mark.parametrize("script", [("compare-convolutions", "compare_convolutions")], indirect=True)
def test_each_step_in_bf16_computes_with_the_weights_of_that_step(script: ModuleType) -> None:
    # Autocast keeps what it has cast until it is left: opened once around all steps it would go on with the first.
    model, generator = script.pretrained().requires_grad_(False), torch.Generator().manual_seed(0)
    model.linear.requires_grad_(True)
    half = torch.randn(64, 3, 32, 16, generator=generator)
    images = torch.cat([half, half.flip(-1)], -1), torch.arange(64) % 10  # the same when mirrored
    sums: list[torch.Tensor] = []
    model.register_forward_hook(lambda module, inputs, logits: sums.append(logits.detach().float().sum(0)))
    script.resnet20.train(model, images, 2, [{"params": model.linear.parameters(), "lr": 0.1}], 0, bf16=True)
    first, second = sums
    assert (second - first).abs().max() > 10


def not_again(name: str, rate: float, seed: int) -> dict[str, object]:
    raise AssertionError(f"{name} at {rate:g} with seed {seed} is not in the results")


@pytest.mark.parametrize("script", [("compare-convolutions", "compare_convolutions")], indirect=True)
def test_the_page_on_convolutions_shows_the_table_of_its_results(script: ModuleType) -> None:
    every = [script.FROZEN, *script.METHODS, *script.NORMED, *script.TRAINED]
    rates = script.rates_of(every)
    lines = script.resnet20.search(DOCS / "convolutions-compared.jsonl", rates, 3, not_again)
    assert script.table(lines, 1000) in (DOCS / "recipes/convolutions.md").read_text()


@pytest.mark.parametrize("script", [("prune-channels", "prune_channels")], indirect=True)
def test_the_page_on_pruning_shows_the_table_of_its_results(script: ModuleType) -> None:
    log = DOCS / "pruning-channels.jsonl"
    names = dict.fromkeys(json.loads(line)["name"] for line in log.read_text().splitlines())
    rates = {name: script.rates_of(name, [1, 4, 16, 64]) for name in names}
    assert (
        script.table(script.resnet20.search(log, rates, 3, not_again)) in (DOCS / "pruning-channels.md").read_text()
    )
