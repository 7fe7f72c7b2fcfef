"""`learning_rate: auto`: what a range test takes from a curve, and that it leaves nothing behind."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import assert_same_bits, write_recipe

from isotune.errors import IsotuneError
from isotune.report.data import collect
from isotune.report.figures.range_tests import range_test_figures
from isotune.training import build_recipe, train
from isotune.training.range_test import chosen, smoothed

RATES = [10.0 ** (-4 + step / 10) for step in range(60)]


def curve(top: float, cliff: float, noise: float = 0.0) -> list[float]:
    """Gains that rise up to one rate and fall from another on."""
    generator = torch.Generator().manual_seed(0)
    jitter = noise * torch.randn(len(RATES), generator=generator)
    rising = [0.1 * min(rate / top, 1.0) if rate < cliff else -3.0 for rate in RATES]
    return [gain + float(shift) for gain, shift in zip(rising, jitter, strict=True)]


@pytest.mark.parametrize("noise", [0.0, 0.003])
def test_the_rate_is_half_of_the_first_with_most_of_the_gain(noise: float) -> None:
    rate = chosen(RATES, curve(0.01, 0.5, noise), scale=1.0)
    # A running mean of the gains comes up to them a few rates later.
    assert rate is not None
    assert 0.8 * 0.01 / 2 <= rate < 0.03 / 2


def test_what_comes_after_the_cliff_does_not_count() -> None:
    gains = curve(0.01, 0.1)
    after = [5.0 if rate > 3 else gain for rate, gain in zip(RATES, gains, strict=True)]
    assert chosen(RATES, after, scale=1.0) == chosen(RATES, gains, scale=1.0)


def test_nothing_gained_is_no_rate() -> None:
    assert chosen(RATES, [-1e-3] * len(RATES), scale=1.0) is None
    assert chosen([], [], scale=1.0) is None


def test_running_means_begin_without_bias() -> None:
    assert smoothed([2.0] * 5) == pytest.approx([2.0] * 5)
    assert smoothed([1.0, 0.0])[1] == pytest.approx(0.8 * 0.2 / (1 - 0.64))


def auto(path: Path, model: Path, rows: Path, **training: Any) -> Path:
    return write_recipe(path / "recipe.yaml", model, rows, path / "run", learning_rate="auto", **training)


def test_a_run_takes_the_rate_that_it_finds_and_is_otherwise_the_run_with_that_number(
    bert: Path, rows: Path, tmp_path: Path
) -> None:
    found = train(build_recipe(auto(tmp_path, bert, rows)), progress=False)
    kept = json.loads((tmp_path / "run" / "range_test.json").read_text())
    rate = found.metrics["learning_rate"]
    assert kept["rate"] == rate
    assert len(kept["rates"]) == len(kept["gains"]) >= 10
    assert all(map(math.isfinite, kept["gains"]))
    (tmp_path / "given").mkdir()
    given = write_recipe(
        tmp_path / "given" / "recipe.yaml", bert, rows, tmp_path / "given" / "run", learning_rate=rate
    )
    same = train(build_recipe(given), progress=False)
    assert same.metrics["train_loss"] == found.metrics["train_loss"]
    assert_same_bits(same.adapter, found.adapter)
    (figure,) = range_test_figures(collect([tmp_path / "run"]).runs)
    assert figure.table.rows[0][1].value == rate  # type: ignore[union-attr]
    assert not range_test_figures(collect([tmp_path / "given" / "run"]).runs)


def test_a_resumed_run_keeps_the_rate_that_was_found(bert: Path, rows: Path, tmp_path: Path) -> None:
    first = train(build_recipe(auto(tmp_path, bert, rows, max_steps=5)), progress=False)
    run = tmp_path / "run"
    file = run / "range_test.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rate": 0.0123}))
    (run / "metrics.json").unlink()
    for folder in run.glob("checkpoint-*"):
        (folder / "complete").unlink()
    again = train(build_recipe(tmp_path / "recipe.yaml"), resume=True, progress=False)
    assert again.metrics["learning_rate"] == 0.0123 != first.metrics["learning_rate"]
    file.write_text("{")
    (run / "metrics.json").unlink()
    with pytest.raises(IsotuneError, match=r"range_test\.json cannot be read"):
        train(build_recipe(tmp_path / "recipe.yaml"), resume=True, progress=False)


def test_rows_from_which_nothing_is_learned_are_said_to_be_so(
    bert: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from isotune.training import range_test

    monkeypatch.setattr(range_test, "chosen", lambda *_: None)
    with pytest.raises(IsotuneError, match="auto found no rate"):
        train(build_recipe(auto(tmp_path, bert, rows)), progress=False)
    with pytest.raises(IsotuneError, match=r"'training\.learning_rate': Input should be a valid number"):
        train(build_recipe(write_recipe(tmp_path / "r.yaml", bert, rows, tmp_path / "x", learning_rate="best")))
