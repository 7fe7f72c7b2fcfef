"""Held-out behaviour of a base model, before and after."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_bert, sentences, write_jsonl

import isotune
from isotune.errors import DataError, DivergedError, IsotuneError, OptionError
from isotune.recipes import checked
from isotune.training.data import load_rows
from isotune.training.evaluation import measured
from isotune.training.forgetting import HIGHER_IS_BETTER, Forgetting, ForgettingSettings
from isotune.training.recipe import DataSettings
from isotune.training.session import Session, TaskSpec

FIRST_WORD = {"cat": "noun", "sees": "verb", "near": "other"}


def spec_of(model: Path, task: str = "classification") -> TaskSpec:
    return TaskSpec(task, str(model), ["animal", "plant"], "auto", 16, "\n", "float32")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> ForgettingSettings:
    """Another task: what kind of word a text begins with."""
    folder = tmp_path_factory.mktemp("words")
    for name, seed in (("train", 5), ("test", 6)):
        starts = list(FIRST_WORD) * 20
        texts = [row["text"] for row in sentences(len(starts), seed)]
        rows = [{"say": f"{s} {text}", "kind": FIRST_WORD[s]} for s, text in zip(starts, texts, strict=True)]
        write_jsonl(folder / f"{name}.jsonl", rows)
    return ForgettingSettings(
        train=str(folder / "train.jsonl"), test=str(folder / "test.jsonl"), text="say", label="kind", max_length=16
    )


@pytest.fixture(scope="module")
def probing(bert: Path, words: ForgettingSettings) -> Forgetting:
    """What the encoder does on another task."""
    return Forgetting(words, spec_of(bert))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of general text."""
    return write_jsonl(tmp_path_factory.mktemp("text") / "text.jsonl", sentences(24, 7))


def damaged(model: Any, amount: float) -> Any:
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.add_(amount * noise)
    return model


def test_an_untouched_adapter_is_the_base_and_a_trained_one_is_not(bert: Path, probing: Forgetting) -> None:
    model = Session(spec_of(bert)).model
    model.train()
    isotune.adapt(model, isotune.method("lora", rank=2), "query-value", train_also=["head"], seed=0)
    assert probing.measure(model) == probing.base
    assert probing.base["similarity"] == 1
    assert probing.base["probe_accuracy"] > 0.6  # of three kinds
    assert model.training
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 if parameter.requires_grad else 0.0)
    after = probing.measure(model)
    assert after["similarity"] < 0.9999
    with isotune.disabled(model):
        assert probing.measure(model) == probing.base


def test_a_regression_is_probed_on_labels_like_a_classification(
    bert: Path, words: ForgettingSettings, probing: Forgetting
) -> None:
    spec = replace(spec_of(bert, "regression"), labels=[])
    forgetting = Forgetting(words, spec)
    assert forgetting.base == probing.base
    assert forgetting.measure(Session(spec).model) == probing.base


def test_a_damaged_encoder_is_worse(bert: Path, probing: Forgetting) -> None:
    found = probing.measure(damaged(Session(spec_of(bert)).model, 2.0))
    assert found.keys() == probing.base.keys() <= HIGHER_IS_BETTER.keys()
    assert found["similarity"] < 0.6
    assert found["probe_accuracy"] < probing.base["probe_accuracy"]


def test_the_measures_are_the_same_each_time(bert: Path, words: ForgettingSettings) -> None:
    few = words.model_copy(update={"max_rows": 30, "test": 0.5})
    torch.manual_seed(1)
    one = Forgetting(few, spec_of(bert))
    state = torch.get_rng_state()
    other = Forgetting(few, spec_of(bert))
    assert torch.get_rng_state().equal(state)
    assert one.base == other.base
    model = damaged(Session(spec_of(bert)).model, 0.1)
    assert one.measure(model) == other.measure(model) == one.measure(model)


def test_perplexity_is_that_of_an_evaluation_and_worse_when_damaged(llama: Path, text: Path) -> None:
    spec = spec_of(llama, "causal-lm")
    forgetting = Forgetting(ForgettingSettings(test=str(text), max_length=16, batch_size=3), spec)
    session = Session(spec)
    rows = load_rows(str(text), DataSettings(train=str(text)), "causal-lm")
    expected, _ = measured(session, session.examples(rows))
    assert forgetting.base == {"perplexity": pytest.approx(expected["perplexity"], rel=1e-5)}
    assert forgetting.measure(session.model) == forgetting.base
    assert forgetting.measure(damaged(session.model, 0.5))["perplexity"] > 1.1 * forgetting.base["perplexity"]


def test_a_model_that_cannot_be_measured_is_refused(
    bert: Path, llama: Path, text: Path, probing: Forgetting, tmp_path: Path
) -> None:
    causal = Session(spec_of(llama, "causal-lm")).model
    with pytest.raises(IsotuneError, match="is measured on a classifier, which LlamaForCausalLM is not"):
        probing.measure(causal)
    with pytest.raises(IsotuneError, match=r"features have 16 dimensions and those of .* have 32"):
        probing.measure(Session(spec_of(make_bert(tmp_path / "narrow", width=16))).model)
    with pytest.raises(DivergedError, match="features are not finite"):
        probing.measure(damaged(Session(spec_of(bert)).model, math.nan))
    reading = Forgetting(ForgettingSettings(test=str(text)), spec_of(llama, "causal-lm"))
    with pytest.raises(DivergedError, match="losses are not finite"):
        reading.measure(damaged(causal, math.nan))


MISTAKES: dict[str, tuple[str, dict[str, Any], str]] = {
    "no such column": ("classification", {"text": "sya"}, r"forgetting: .*no column 'sya'.* Did you mean 'say'"),
    "no such label column": ("classification", {"label": "kinds"}, "no column 'kinds'"),
    "no such file": ("classification", {"test": "./nowhere.jsonl"}, "forgetting: no data file or folder at"),
    "no rows": ("classification", {"train": "{empty}"}, "forgetting: .* the file is empty"),
    "no rows to probe on": ("classification", {"train": None}, "forgetting.train is missing"),
    "a probe for a language model": ("causal-lm", {}, "there is no forgetting.train"),
    "no text for a language model": ("causal-lm", {"train": None, "test": 0.3}, "forgetting.test names the text"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told_before_a_model_is_loaded(name: str, words: ForgettingSettings, tmp_path: Path) -> None:
    task, changes, message = MISTAKES[name]
    (tmp_path / "empty.jsonl").write_text("")
    filled = {key: str(tmp_path / "empty.jsonl") if value == "{empty}" else value for key, value in changes.items()}
    with pytest.raises((DataError, OptionError), match=message):
        Forgetting(words.model_copy(update=filled), spec_of(tmp_path / "no-model", task))


def test_settings_are_checked_and_made_absolute(
    words: ForgettingSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(IsotuneError, match="key 'test': a fraction lies between 0 and 1"):
        checked(ForgettingSettings, flags={"test": 1.5})
    with pytest.raises(IsotuneError, match=r"unknown key 'labl'. Did you mean 'label'"):
        checked(ForgettingSettings, flags={"labl": "x"})
    (tmp_path / "own.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path)
    resolved = ForgettingSettings(train="own.jsonl", test="validation").resolved()
    assert resolved.train == str(tmp_path / "own.jsonl")
    assert resolved.test == "validation"
    assert words.resolved() == words
