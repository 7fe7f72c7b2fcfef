"""`isotune train` with every registered method, and the learning rate that a recipe without one gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import make_bert, tensors
from torch import nn

import isotune
from isotune.adapters.registry import method_class, method_names
from isotune.errors import OptionError
from isotune.sites import require_site
from isotune.sites.block import Block
from isotune.training import build_recipe, train
from support import PROMPTS, Reader

WIDTH = 64


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an encoder that is tiny, but wide enough for default options."""
    return make_bert(tmp_path_factory.mktemp("encoder"), WIDTH, 96)


def fitting(name: str) -> dict[str, Any]:
    """The method's name, and a smaller rank where the default options do not fit the encoder's layers."""
    site = Block(Reader(WIDTH)) if name in PROMPTS else require_site(nn.Linear(WIDTH, WIDTH), "probe")
    for options in ({}, *({"rank": rank} for rank in (16, 8, 4, 2))):
        try:
            isotune.method(name, **options).build(site, torch.Generator())
        except OptionError:
            continue
        return {"name": name, **options}
    raise AssertionError(f"{name}: neither the default options nor a smaller rank fit a {WIDTH} x {WIDTH} layer")


def recipe_of(path: Path, model: Path, rows: Path, method: Any, **training: Any) -> Path:
    """A recipe of two steps."""
    name = method if isinstance(method, str) else method["name"]
    recipe = {
        "model": str(model),
        "data": {"train": str(rows / "train.jsonl"), "validation": None, "max_length": 8, "max_train_rows": 8},
        "method": method,
        "targets": None if name in ("ln_tuning", *PROMPTS) else "query-value",
        "head": "random",
        "training": {"max_steps": 2, "per_device_train_batch_size": 4, "save_strategy": "no", **training},
        "output": str(path / "run"),
    }
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return path / "recipe.yaml"


@pytest.mark.parametrize("name", method_names())
def test_every_method_trains_from_a_recipe_at_its_own_learning_rate(
    name: str, encoder: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hint = method_class(name).learning_rate
    recipe = build_recipe(recipe_of(tmp_path, encoder, rows, fitting(name)))
    result = train(recipe)
    assert f"learning rate {hint:g}, {name}'s default (training.learning_rate sets it)" in capsys.readouterr().err
    metrics = json.loads((result.output / "metrics.json").read_text())
    assert metrics["steps"] == 2
    assert (metrics["method"], metrics["learning_rate"]) == (name, hint)
    assert metrics["learning_rate_is_the_methods_default"]
    assert 0 < metrics["train_loss"] < 10
    assert metrics["trainable_parameters_encoder"] > 0
    saved = tensors(result.adapter)
    at_least = {"prompt": 0, "deep_prompt": 2}.get(name, 4)  # of one for the model, and of one for each layer
    assert sum("encoder.layer." in key for key in saved) >= at_least
    assert all(tensor.isfinite().all() for tensor in saved.values() if tensor.is_floating_point())


def test_the_recipes_own_learning_rate_is_used_and_reported_as_such(
    encoder: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe_of(tmp_path, encoder, rows, "lora", learning_rate=0.0123)
    metrics = train(build_recipe(path)).metrics
    assert "default" not in capsys.readouterr().err
    assert metrics["learning_rate"] == 0.0123
    assert not metrics["learning_rate_is_the_methods_default"]


def test_the_learning_rate_reaches_the_optimizer(encoder: Path, rows: Path, tmp_path: Path) -> None:
    path = recipe_of(
        tmp_path, encoder, rows, "hra", lr_scheduler_type="constant", logging_steps=1, save_strategy="steps"
    )
    result = train(
        build_recipe(path, sets=["training.warmup_steps=0", "training.save_strategy=steps"]), progress=False
    )
    state = json.loads((result.output / "checkpoint-2" / "trainer_state.json").read_text())
    assert {entry["learning_rate"] for entry in state["log_history"] if "learning_rate" in entry} == {3e-3}
