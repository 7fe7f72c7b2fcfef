"""The example of spoken words: its recipe is one, and its data are drawn by a seed, with voices apart."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from examples import ROOT, load_script
from isotune.comparison import build_comparison
from isotune.training.data import load_splits
from isotune.training.recipe import DataSettings

FOLDER = ROOT / "examples" / "compare-audio"


@pytest.fixture
def maker(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with tones for what espeak-ng says, and what it was asked for."""
    found: Any = load_script(FOLDER / "make_data.py", monkeypatch)
    found.asked = []

    def said(word: str, voice: str, *how: int) -> np.ndarray:
        assert len(how) == 2  # speed and pitch
        found.asked.append((word, voice))
        return np.sin(np.arange(found.RATE // 2) * 0.01 * (1 + found.WORDS.index(word)))

    monkeypatch.setattr(found, "said", said)
    return found


def written(maker: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> dict[str, bytes]:
    monkeypatch.setattr(sys, "argv", ["make_data.py", str(folder), "--clips", "2", "1", "1", *options])
    maker.main()
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.wav"))}


def test_its_recipe_compares_what_it_says() -> None:
    recipe = build_comparison(FOLDER / "recipe.yaml")
    assert (recipe.task, recipe.data.max_seconds) == ("audio-classification", 1)
    assert {one["name"] for one in recipe.methods} == {
        "lora", "hra", "houlsby", "adaptformer", "bitfit", "ln_tuning", "ssf",
    }  # fmt: skip


def test_no_voice_is_in_two_splits(maker: ModuleType) -> None:
    for one, other in itertools.combinations(maker.VOICES.values(), 2):
        assert not set(one) & set(other)


def test_the_seed_decides_the_files(maker: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = written(maker, tmp_path / "a", monkeypatch)
    assert len(first) == 4 * len(maker.WORDS)
    assert first == written(maker, tmp_path / "b", monkeypatch)
    other = written(maker, tmp_path / "c", monkeypatch, "--seed", "1")
    assert not set(first.values()) & set(other.values())
    assert {voice for _, voice in maker.asked} == {voice for voices in maker.VOICES.values() for voice in voices}
    found = load_splits(
        DataSettings(train=str(tmp_path / "a"), validation="validation", test="test"), "audio-classification", 0
    )
    assert [len(rows) for rows in (found.train, found.validation, found.test)] == [32, 16, 16]
    assert all(len(row["audio"].wave) == row["audio"].rate == maker.RATE for row in found.train)
