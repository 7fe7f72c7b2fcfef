"""From a run to the statistics of its weights: the optimizer's second moments, and the Fisher information."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_llama, write_jsonl, write_recipe

import isotune
from isotune.errors import CheckpointError, DataError, IsotuneError, OptionError
from isotune.merging.recipe import build_merge_recipe
from isotune.merging.record import MergedModel
from isotune.statistics.fisher import fisher
from isotune.statistics.stored import StoredStatistic
from isotune.training import build_recipe, collect_fisher, train
from isotune.training.merging import merge_recipe
from isotune.training.session import Session, TaskSpec

LORA = ["save_second_moments=true", "method.name=lora", "method.rank=2"]
QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.fixture(scope="module")
def run(bert: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of LoRA, with its second moments."""
    folder = tmp_path_factory.mktemp("lora")
    recipe = write_recipe(folder / "recipe.yaml", bert, rows, folder / "run", max_steps=10)
    return train(build_recipe(recipe, sets=LORA), progress=False).output


def test_run_leaves_the_second_moments_of_all_it_trained(run: Path) -> None:
    found = StoredStatistic(run / "adapter", "second_moment")
    assert found.made == {"steps": 10}
    assert found.shapes[QUERY] == (32, 32)
    assert found.shapes["classifier"] == (2, 32)
    assert found.shapes["classifier.bias"] == (2,)
    assert len(found.shapes) == 6
    assert all(found.of(path).any() for path in found.shapes)
    isotune.load(Session(TaskSpec.read(run / "adapter")).model, run / "adapter")


def test_run_killed_before_its_end_has_the_same_moments(run: Path, tmp_path: Path) -> None:
    again = tmp_path / "run"
    shutil.copytree(run, again)
    (again / "metrics.json").unlink()
    shutil.rmtree(again / "adapter")
    (again / "recipe.yaml").write_text((run / "recipe.yaml").read_text().replace(str(run), str(again)))
    train(build_recipe(again / "recipe.yaml"), resume=True, progress=False)
    one, other = (StoredStatistic(path / "adapter", "second_moment") for path in (run, again))
    assert all(one.of(path).equal(other.of(path)) for path in one.shapes)


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["method.name=hra"], "use its Fisher information"),
        (["training.optim=adafactor"], "needs training.optim to be adamw_torch or adamw_torch_fused"),
        (["training.fsdp=full_shard"], "does not go with training.fsdp"),
    ],
)
def test_run_that_could_not_save_them_does_not_start(
    bert: Path, rows: Path, tmp_path: Path, sets: list[str], message: str
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", bert, rows, tmp_path / "run", max_steps=2)
    with pytest.raises(IsotuneError, match=message):
        train(build_recipe(recipe, sets=[*LORA, *sets]), progress=False)
    assert not (tmp_path / "run").exists()


def test_fisher_of_a_run_is_that_of_its_training_rows(run: Path) -> None:
    file = collect_fisher(run, examples=30, batch_size=7, progress=False)
    assert file == run / "adapter" / "fisher.safetensors"
    found = StoredStatistic(run / "adapter", "fisher")
    assert found.made == {"examples": 30, "expectation": "exact", "seed": 0, "data": None}
    assert found.shapes.keys() == StoredStatistic(run / "adapter", "second_moment").shapes.keys()

    spec = TaskSpec.read(run / "adapter")
    session = Session(spec)
    isotune.load(session.model, run / "adapter")
    rows = [{"text": "the old cat"}, {"text": "a small oak near the fig"}]
    data = write_jsonl(run / "two.jsonl", [{**row, "label": "animal"} for row in rows])
    collect_fisher(run / "adapter", str(data), progress=False)
    found = StoredStatistic(run / "adapter", "fisher")
    assert found.made["examples"] == 2
    expected = fisher(session.model, [session.collator([example]) for example in session.examples(rows)])
    for path, wanted in expected.items():
        torch.testing.assert_close(found.of(path), wanted, rtol=1e-3, atol=1e-9)


def test_empirical_fisher_takes_the_labels_and_stands_in_for_second_moments(run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(run, tmp_path / "copy")
    data = write_jsonl(tmp_path / "new.jsonl", [{"text": "the old cat", "label": "rock"}] * 2)
    with pytest.raises(DataError, match="has the label 'rock'"):
        collect_fisher(run, str(data), expectation="empirical", progress=False)
    collect_fisher(run, expectation="empirical", examples=3, progress=False)
    assert StoredStatistic(run / "adapter", "fisher").made["expectation"] == "empirical"
    collect_fisher(run, kind="second_moment", examples=3, progress=False)
    stands_in = StoredStatistic(run / "adapter", "second_moment")
    assert stands_in.made["expectation"] == "empirical"
    assert stands_in.of(QUERY).equal(StoredStatistic(run / "adapter", "fisher").of(QUERY))
    with pytest.raises(OptionError, match="examples=0"):
        collect_fisher(run, examples=0)


def test_fisher_of_a_causal_run_draws_tokens(llama: Path, prompts: Path, tmp_path: Path) -> None:
    flags = {
        "model": str(llama), "task": "causal-lm", "data.train": str(prompts), "data.prompt": "question",
        "data.completion": "answer", "data.max_length": 32, "method.name": "hra", "method.rank": 2,
        "training.max_steps": 2, "output": str(tmp_path / "run"),
    }  # fmt: skip
    train(build_recipe(flags=flags), progress=False)
    collect_fisher(tmp_path / "run", examples=5, progress=False)
    found = StoredStatistic(tmp_path / "run" / "adapter", "fisher")
    assert found.made["expectation"] == "sample"
    assert all(found.of(path).any() for path in found.shapes)
    (tmp_path / "run" / "adapter" / "task.json").write_text(json.dumps({}))
    with pytest.raises(IsotuneError, match="cannot be read"):
        collect_fisher(tmp_path / "run", progress=False)


@pytest.mark.parametrize("rule", ["fisher", "ota", "ffg"])
def test_runs_that_trained_whole_models_are_merged_by_the_statistics_that_they_leave(
    rule: str, full_runs: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, models = full_runs
    found = merge_recipe(
        build_merge_recipe(
            None, {"models": [{"path": str(p)} for p in models], "rule.name": rule, "base": str(base),
                   "output": str(tmp_path / rule)},
        ), progress=False,
    )  # fmt: skip
    assert isinstance(found, MergedModel)
    assert found.changed == found.tensors
    out = load_file(tmp_path / rule / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in out.values())


def test_a_merge_of_models_without_statistics_says_how_to_make_them(
    full_runs: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, models = full_runs
    bare = shutil.copytree(models[1], tmp_path / "bare", ignore=shutil.ignore_patterns("fisher.safetensors"))
    recipe = build_merge_recipe(
        None, {"models": [{"path": str(models[0])}, {"path": str(bare)}], "rule.name": "fisher", "base": str(base),
               "output": str(tmp_path / "out")},
    )  # fmt: skip
    with pytest.raises(
        CheckpointError, match=r"bare.* holds no fisher.safetensors; make it with: isotune statistics"
    ):
        merge_recipe(recipe, progress=False)


@pytest.fixture(scope="module")
def full_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A language model, and two that were trained in full from it, with both statistics beside their weights."""
    folder = tmp_path_factory.mktemp("full")
    base = make_llama(folder / "base")
    prompts = write_jsonl(folder / "prompts.jsonl", [{"prompt": "one two", "completion": "three"}] * 8)
    for seed in (0, 1):
        flags = {
            "model": str(base), "task": "causal-lm", "data.train": str(prompts), "data.max_length": 16,
            "data.prompt": "prompt", "data.completion": "completion", "method": "full", "save_second_moments": True,
            "training.max_steps": 2, "seed": seed, "output": str(folder / f"run{seed}"),
        }  # fmt: skip
        train(build_recipe(flags=flags), progress=False)
        collect_fisher(folder / f"run{seed}", examples=4, progress=False)
    return base, [folder / f"run{seed}" / "model" for seed in (0, 1)]
