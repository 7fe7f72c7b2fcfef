"""Small models on disk, fine-tuned from one base, and rules that show what they see."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from isotune.linalg.change import Change, dense, scaled, size, total
from isotune.merging.contract import Aligned, Rule
from isotune.merging.run import Run

LLAMA = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 32,
}  # fmt: skip
BERT = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 32,
}  # fmt: skip


def llama(**changes: Any) -> Any:
    """A drawn Llama, the same each time for the same config."""
    torch.manual_seed(11)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, **changes}))


def bert() -> Any:
    """A drawn BERT with a head for masked tokens, whose matrix and bias are tied."""
    torch.manual_seed(12)
    return transformers.BertForMaskedLM(transformers.BertConfig(**BERT))


def gpt2() -> Any:
    """A drawn GPT-2, whose layers store their weights (in, out)."""
    torch.manual_seed(13)
    config = transformers.GPT2Config(
        vocab_size=40, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1
    )
    return transformers.GPT2LMHeadModel(config)


def save(model: nn.Module, folder: Path, shard: str = "6KB", tokens: Sequence[str] | None = None) -> Path:
    """Save a model in shards, with a tokenizer of one token for each row of its embeddings, or the given ones."""
    model.save_pretrained(folder, max_shard_size=shard)
    names = [f"t{i}" for i in range(model.config.vocab_size)] if tokens is None else tokens
    vocabulary = {token: i for i, token in enumerate(names)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}))
    return folder


def tuned(build: Callable[[], Any], seed: int, only: str = "", size: float = 0.02) -> Any:
    """The model with noise on the parameters whose names contain `only`."""
    model, generator = build(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name:
                parameter.add_((size * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype))
    return model


def family(folder: Path, build: Callable[[], Any] = llama, count: int = 2, **options: Any) -> tuple[Path, list[Path]]:
    """A base in a folder, and models fine-tuned from it."""
    base = save(build(), folder / "base", **options)
    return base, [save(tuned(build, i), folder / f"model{i}", **options) for i in range(count)]


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder."""
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any], metadata: dict[str, str] | None = None) -> None:
    """Alter the tensors of a model folder, which becomes one file."""
    tensors = stored(folder)
    change(tensors)
    for file in folder.glob("model*"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", **(metadata or {})})


def reconfigure(folder: Path, **changes: Any) -> None:
    """Alter the config of a model folder."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def in_memory(rule: Rule, base: Path, folders: Sequence[Path], weights: Sequence[float]) -> dict[str, Tensor]:
    """What the merged tensors should be, from whole models in memory."""
    W0, models = stored(base), [stored(folder) for folder in folders]
    paths = {name.removesuffix(".weight") if name.endswith("proj.weight") else name: name for name in W0}
    paths = {"lm_head" if path == "lm_head.weight" else path: name for path, name in paths.items()}

    def sites() -> Iterable[Aligned]:
        for path, name in paths.items():
            changes = tuple(model[name] - W0[name] for model in models)
            yield Aligned(path, tuple(f.name for f in folders), changes, tuple(weights), path != name)

    run = Run(rule, sites)
    found = {site.path: dense(change) for site, change in run}
    return {paths[path]: W0[paths[path]] + run.factor * change for path, change in found.items()}


class Toy(Rule):
    """Surveys, draws, and rescales: noise on the sum, over the norm of all models, at their mean norm in the end."""

    name: ClassVar[str] = "toy"
    random: ClassVar[bool] = True
    noise: float = Field(0.1, ge=0.0, description="Size of the noise.")

    def survey(self, sites: Iterable[Aligned]) -> float:
        return sum(size(change) ** 2 for site in sites for change in site.changes) ** 0.5

    def merge(self, site: Aligned, surveyed: Any) -> Change:
        drawn = [torch.randn(change.shape, generator=site.generator(name))
                 for name, change in zip(site.names, site.changes, strict=True)]  # fmt: skip
        return scaled(total([*site.dense(), *drawn], [*site.weights, *[self.noise] * len(drawn)]), 1 / surveyed)

    def rescale(self, norms: Sequence[float], merged: float) -> float:
        return sum(norms) / len(norms) / merged


class Seen(Rule):
    """The sum, noting every site."""

    name: ClassVar[str] = "seen"
    sites: dict[str, tuple[tuple[int, ...], bool]] = Field(default_factory=dict)

    def merge(self, site: Aligned, surveyed: Any) -> Change:
        self.sites[site.path] = tuple(site.changes[0].shape), site.matrix
        return total(site.changes, site.weights)
