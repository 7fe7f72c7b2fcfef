"""Three runs of one tiny model that look as `isotune train` leaves them: a LoRA, an HRA and a full fine-tuning."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml
from tiny import make_bert
from transformers import AutoModel

import isotune
from isotune import HRA, LoRA
from support import adapted

MARK = "# A resolved isotune recipe: `isotune evaluate` and `isotune train --resume` read it.\n"


def write_run(folder: Path, method: str = "hra", metrics: bool = True, history: bool = True) -> Path:
    """A finished run's folder, whose weights are empty folders."""
    (folder / ("model" if method == "full" else "adapter")).mkdir(parents=True)
    recipe = {"model": str(folder.parent / "base"), "task": "classification", "method": {"name": method}}
    (folder / "recipe.yaml").write_text(MARK + yaml.safe_dump(recipe))
    found = {"test_accuracy": 0.8, "method": method, "learning_rate": 0.01, "torch_version": "2.13.0", "steps": 20,
             "trainable_parameters_encoder": 1234, "learning_rate_is_the_methods_default": True}  # fmt: skip
    if metrics:
        (folder / "metrics.json").write_text(json.dumps(found))
    if history:
        lines = [{"step": step, "loss": 1 / step} for step in range(1, 20)]
        (folder / "history.json").write_text(
            json.dumps([*lines, {"step": 20, "eval_loss": 0.3, "eval_accuracy": 0.8}])
        )
    return folder


def trained_runs(folder: Path) -> list[Path]:
    """`full-run`, `lora-run` and `hra-run` of the model in `base`."""
    base = make_bert(folder / "base")
    found = [write_run(folder / f"{method}-run", method) for method in ("full", "lora", "hra")]
    model = AutoModel.from_pretrained(base)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("query.weight"):
                weight += 0.05 * torch.randn(weight.shape, generator=draw)
    model.save_pretrained(found[0] / "model")
    for run, method in zip(found[1:], (LoRA(rank=2), HRA(rank=4)), strict=True):
        model = adapted(AutoModel.from_pretrained(base), method, ["query"], seed=0)
        isotune.save(model, run / "adapter", base_model=str(base))
    return found
