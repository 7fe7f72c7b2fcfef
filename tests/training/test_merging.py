"""Merging what was trained: runs by recipe, their scores on their own rows, and full models."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_llama, sentences, tensors, write_jsonl, write_recipe
from transformers import LlamaForCausalLM

from isotune.checkpoint.read import read_stored
from isotune.errors import CheckpointError, IsotuneError, OptionError
from isotune.merging.recipe import MergeRecipe, build_merge_recipe
from isotune.merging.record import CompressedAdapters, MergedAdapter, MergedModel, MovedSkill
from isotune.merging.reversible.adapters import recover_adapter
from isotune.training import build_recipe, evaluate, train
from isotune.training import scores as module
from isotune.training.folder import RunFolder
from isotune.training.merging import explain_recipe, merge_recipe
from isotune.training.scores import Tasks
from isotune.training.weight_search import FIRST, search_weights

LORA = ["method.name=lora", "method.rank=2", "training.max_steps=12", "training.learning_rate=0.03"]


@pytest.fixture(scope="module")
def runs(bert: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Runs on one base: one with two labels, one with three."""
    folder = tmp_path_factory.mktemp("runs")
    three = folder / "three rows"
    three.mkdir()
    for name, count, seed in (("train", 48, 1), ("test", 15, 2)):
        found = [row | {"label": "abc"[len(row["text"].split()) % 3]} for row in sentences(count, seed)]
        write_jsonl(three / f"{name}.jsonl", found)
    made = []
    for name, data in (("two", rows), ("three", three)):
        recipe = write_recipe(folder / f"{name}.yaml", bert, data, folder / name)
        made.append(train(build_recipe(recipe, sets=LORA), progress=False).output)
    return made


def recipe_of(folders: list[Path], output: Path | None = None, sets: Sequence[str] = (), **flags: Any) -> MergeRecipe:
    given = {"models": [str(folder) for folder in folders], "output": None if output is None else str(output)}
    return build_merge_recipe(None, given | flags, sets)


@pytest.fixture(scope="module")
def merged(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sum of both, without their heads."""
    out = tmp_path_factory.mktemp("merged") / "out"
    merge_recipe(recipe_of(runs, out, modules="drop"), progress=False)
    return out


def test_runs_are_merged_by_recipe(runs: list[Path], merged: Path) -> None:
    stored = read_stored(merged)
    assert stored.trained == {}
    assert set(stored.settings) == set(read_stored(runs[0] / "adapter").settings)
    assert {s.rank for s in stored.settings.values()} == {4}  # type: ignore[attr-defined]
    report = json.loads((merged / "merge.json").read_text())
    assert report["models"] == {"two": 1.0, "three": 1.0}


def test_tasks_have_their_own_rows_and_heads(runs: list[Path], merged: Path) -> None:
    tasks = Tasks(runs, "test")
    assert tasks.rows == 30
    assert tasks.tasks[0].session is tasks.tasks[1].session
    for run, name in zip(runs, ("two", "three"), strict=True):
        own = tasks.metrics(run / "adapter")
        assert list(own) == ["two", "three"]
        expected = evaluate(run, progress=False)
        for key in ("loss", "accuracy", "macro_f1"):
            assert own[name][key] == pytest.approx(expected[key], rel=1e-5)
    found = tasks.metrics(merged)
    assert tasks.score(merged) == pytest.approx(sum(task["accuracy"] for task in found.values()) / 2)
    bare = tasks.metrics(None)
    assert bare["two"]["loss"] != pytest.approx(found["two"]["loss"], rel=1e-3)
    assert tasks.metrics(merged) == found
    assert tasks.metrics(None) == bare


@pytest.mark.parametrize("keep", ["two", "three"])
def test_a_head_that_was_merged_too_is_not_what_tasks_are_measured_with(
    keep: str, runs: list[Path], merged: Path, tmp_path: Path
) -> None:
    merge_recipe(recipe_of(runs, tmp_path / "out", modules=keep), progress=False)
    tasks = Tasks(runs, "test")
    expected = tasks.metrics(merged)
    found = tasks.metrics(tmp_path / "out")
    for name in ("two", "three"):
        assert found[name]["loss"] == pytest.approx(expected[name]["loss"], rel=1e-6)
    # With its head and its task.json the merged adapter is evaluated as the run that they are from.
    rows = RunFolder(dict(zip(("two", "three"), runs, strict=True))[keep]).recipe().data.test
    measured = evaluate(tmp_path / "out", str(rows), columns={"text": "text", "label": "label"}, progress=False)
    assert measured["accuracy"] == found[keep]["accuracy"]


def test_language_models_are_scored_by_their_loss(llama: Path, prompts: Path, tmp_path: Path) -> None:
    flags = {
        "model": str(llama), "task": "causal-lm", "data.train": str(prompts), "data.prompt": "question",
        "data.completion": "answer", "data.max_length": 32, "targets": "attention", "output": str(tmp_path / "run"),
        "training.max_steps": 2,
    }  # fmt: skip
    run = train(build_recipe(None, flags, LORA[:2]), progress=False).output
    tasks = Tasks([run])
    assert tasks.score(run / "adapter") == -tasks.metrics(run / "adapter")["run"]["loss"] < 0


def test_a_search_ends_no_worse_than_it_began(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores: list[float] = []

    class Counted(Tasks):
        def score(self, adapter: str | Path | None) -> float:
            scores.append(super().score(adapter))
            return scores[-1]

    monkeypatch.setattr(module, "Tasks", Counted)
    recipe = recipe_of(runs, tmp_path / "out", modules="drop")
    found = merge_recipe(recipe, search=4, progress=False)
    assert isinstance(found, MergedAdapter)
    assert len(scores) == 4
    tasks = Tasks(runs)
    assert tasks.score(tmp_path / "out") == pytest.approx(max(scores))
    assert max(scores) >= scores[0]
    again = merge_recipe(recipe, search=4, progress=False)
    assert isinstance(again, MergedAdapter)
    assert again.models == found.models


def test_weights_that_cannot_be_used_score_worst() -> None:
    found = search_weights(lambda weights: -math.inf if weights[0] > 0.9 else weights[0], [1.0, 1.0], 12)
    assert found.trials[0]["score"] == -math.inf
    assert 0.5 <= found.weights[0] <= 0.9
    assert found.score == found.weights[0]


def test_a_search_is_refused_before_its_first_trial(runs: list[Path], tmp_path: Path) -> None:
    for flags, message in [
        ({}, "trained in full, of different shapes; say what to do: modules=drop"),
        ({"modules": "drop", "rank": 2, "rule.name": "karcher"}, "rank= is for rules on changes"),
    ]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "search_weights", lambda *_: pytest.fail("the search began"))
            with pytest.raises(IsotuneError, match=message):
                merge_recipe(recipe_of(runs, tmp_path / "out", **flags), search=4, progress=False)
    adapters = [run / "adapter" for run in runs]
    with pytest.raises(IsotuneError, match=r"adapter is no run's folder, whose validation rows could be used"):
        merge_recipe(recipe_of(adapters, tmp_path / "out", modules="drop"), search=2, progress=False)
    assert not (tmp_path / "out").exists()


def test_the_sampler_finds_a_simple_optimum() -> None:
    calls: list[list[float]] = []

    def score(weights: list[float]) -> float:
        calls.append(weights)
        return -((weights[0] - 0.8) ** 2) - (weights[1] - 0.2) ** 2

    found = search_weights(score, [2.0, -1.0], 30)
    assert [trial["weights"] for trial in found.trials[:4]] == [[2.0, -1.0], *([w, w] for w in FIRST)]
    assert len(found.trials) == len(calls) == 30
    assert found.score == max(trial["score"] for trial in found.trials) > -0.05
    assert score(found.weights) == found.score
    assert found == search_weights(score, [2.0, -1.0], 30)
    assert len(search_weights(score, [1.0, 1.0], 2).trials) == 2


def test_a_search_without_optuna_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(OptionError, match=r"pip install 'isotune\[search\]'"):
        search_weights(lambda _: 0.0, [1.0], 2)


def test_runs_are_explained_without_being_merged(runs: list[Path]) -> None:
    before = sorted(path for run in runs for path in run.rglob("*"))
    found = explain_recipe(recipe_of(runs, sets=["rule.name=ties"]))
    assert found.rule == "ties"
    assert found.weights == {"two": 1.0, "three": 1.0}
    assert {site.path for site in found.sites} == set(read_stored(runs[0] / "adapter").settings)
    assert all(site.ranks == {"two": 2, "three": 2} for site in found.sites)
    assert sorted(path for run in runs for path in run.rglob("*")) == before


def test_a_run_that_is_not_finished_is_told(runs: list[Path], tmp_path: Path) -> None:
    shutil.copytree(runs[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    with pytest.raises(IsotuneError, match=r"is not finished: isotune train .* --resume"):
        merge_recipe(recipe_of([tmp_path / "run", runs[1]], tmp_path / "out"), progress=False)


def test_rule_rmm_keeps_every_run(runs: list[Path], tmp_path: Path) -> None:
    recipe = recipe_of(runs, tmp_path / "all", sets=["rule.name=rmm", "rule.basis=1"])
    found = merge_recipe(recipe, progress=False)
    assert isinstance(found, CompressedAdapters)
    assert found.errors.keys() == found.predicted.keys() == {"two", "three"}
    assert found.values > 0
    out = recover_adapter(tmp_path / "all", "three", tmp_path / "again")
    before, after = tensors(runs[1] / "adapter"), load_file(out / "adapter_model.safetensors")
    assert torch.equal(after["base_model.model.classifier.weight"], before["base_model.model.classifier.weight"])
    weighted = build_merge_recipe(
        None, {"models": [{"path": str(runs[0])}, {"path": str(runs[1]), "weight": 0.5}], "rule.name": "rmm",
               "output": str(tmp_path / "no")},
    )  # fmt: skip
    with pytest.raises(OptionError, match="rule rmm keeps every adapter as it is; weights have no meaning"):
        merge_recipe(weighted, progress=False)
    assert not (tmp_path / "no").exists()


# Full models.


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A base model, and two that were fine-tuned from it."""
    folder = tmp_path_factory.mktemp("family")
    base = make_llama(folder / "base")
    for name in ("a", "b"):
        shutil.copytree(base, folder / name)
        model = LlamaForCausalLM.from_pretrained(base)
        torch.manual_seed(ord(name))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        model.save_pretrained(folder / name)
    return base, [folder / "a", folder / "b"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_full_models_are_merged_by_recipe(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, models = family
    recipe = recipe_of(
        models, tmp_path / "out", ["rule.scale=0.4"], base=str(base), **{"rule.name": "task_arithmetic"}
    )
    found = merge_recipe(recipe, progress=False)
    assert isinstance(found, MergedModel)
    W0, a, b, out = map(weights, (base, *models, tmp_path / "out"))
    for name, W in W0.items():
        torch.testing.assert_close(out[name], W + 0.4 * (a[name] - W + b[name] - W))
    LlamaForCausalLM.from_pretrained(tmp_path / "out")


def test_rule_symmetry_moves_a_skill(family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, (target, skilled) = family
    sets = ["rule.name=symmetry", "rule.scale=0.5"]
    for name, more in (("aligned", []), ("plain", ["rule.use=[]"])):
        recipe = recipe_of([target, skilled], tmp_path / name, [*sets, *more], base=str(base))
        assert isinstance(merge_recipe(recipe, progress=False), MovedSkill)
    W0, a, b, aligned, plain = map(weights, (base, target, skilled, tmp_path / "aligned", tmp_path / "plain"))
    for name, W in W0.items():
        torch.testing.assert_close(plain[name], a[name] + 0.5 * (b[name] - W))
    assert any(not aligned[name].allclose(plain[name]) for name in W0)
    weighted = [recipe.models[0], recipe.models[1].model_copy(update={"weight": 0.5})]
    with pytest.raises(OptionError, match="weights have no meaning for rule symmetry; --set scale"):
        merge_recipe(recipe.model_copy(update={"models": weighted}), progress=False)


@pytest.mark.parametrize(
    ("flags", "options", "message"),
    [
        ({}, {"search": 3}, "--search measures adapters on the rows of their runs; it cannot search for full models"),
        ({"rank": 4}, {}, "--rank and --modules are for adapters, and these are full models"),
        ({"modules": "drop"}, {}, "--rank and --modules are for adapters"),
        ({"rule.name": "karcher"}, {}, "rule karcher merges adapters, and these are full models"),
        ({"rule.name": "ties"}, {}, "name the pretrained model with base"),
        ({"rule.name": "symmetry"}, {}, "rule symmetry needs --base"),
    ],
)
def test_what_full_models_cannot_have_is_told(
    flags: dict[str, Any], options: dict[str, Any], message: str, family: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match=message):
        merge_recipe(recipe_of(family[1], tmp_path / "out", **flags), progress=False, **options)
    assert list(tmp_path.iterdir()) == []


def test_what_adapters_cannot_have_is_told(runs: list[Path], family: tuple[Path, list[Path]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(OptionError, match="--resume goes on with a merge of full models"):
        merge_recipe(recipe_of(runs, out), resume=True, progress=False)
    with pytest.raises(OptionError, match="--vocabulary is for full models"):
        merge_recipe(recipe_of(runs, out, vocabulary="intersect"), progress=False)
    with pytest.raises(OptionError, match="rule symmetry merges full models"):
        merge_recipe(recipe_of(runs, out, sets=["rule.name=symmetry"]), progress=False)
    with pytest.raises(CheckpointError, match="is a full model, and no adapter; merge adapters with adapters"):
        merge_recipe(recipe_of([runs[0], family[0]], out), progress=False)
    with pytest.raises(CheckpointError, match="is a full model, and no adapter"):
        explain_recipe(recipe_of([runs[0], family[0]]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"models": []}, "key 'models': List should have at least 1 item"),
        ({"models": [{"path": "a", "wieght": 1}]}, "unknown key 'models.0.wieght'. Did you mean 'weight'?"),
        ({"models": ["a", {"weight": 1}]}, "key 'models.1.path' is missing: Folder of an adapter"),
        ({"models": [{"path": "a", "name": "x"}, "b"]}, "give every model a name, or none of them"),
        ({"models": ["a"], "rank": 0}, "key 'rank': Input should be greater than or equal to 1"),
        ({"models": ["a"], "vocabulary": "union"}, "key 'vocabulary': Input should be 'error' or 'intersect'"),
        ({"models": ["a"], "vocabluary": 1}, "unknown key 'vocabluary'. Did you mean 'vocabulary'?"),
    ],
)
def test_mistakes_in_a_recipe_are_named(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(IsotuneError) as raised:
        build_merge_recipe(None, flags)
    assert str(raised.value).startswith(f"the command line: {message}")
