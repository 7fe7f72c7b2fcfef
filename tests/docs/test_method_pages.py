"""The page of a method says what its code says, and what it shows runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar, Literal

import pytest
import yaml
from pydantic import Field
from torch import nn

import isotune
from examples import run_isotune
from isotune import LoRA
from isotune.adapters.registry import BUILT_IN, method_class
from isotune.cli.method_pages import method_page, prose
from isotune.model.catalogue import probe
from support import PROMPTS


class Block(nn.Module):
    """One part of each kind that a preset names, large enough for every method's default options."""

    def __init__(self, attention: tuple[str, ...] = ("query",)) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({name: nn.Linear(256, 256, bias=False) for name in attention})
        self.mlp = nn.ModuleDict({"up": nn.Linear(256, 256)})
        self.norm = nn.LayerNorm(256, bias=False)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block()])


class Transformer(Model):
    """What prompts need beside: layers for keys and values, and a vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[0] = Block(("query", "key", "value"))
        self.embedding = nn.Embedding(8, 256)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(self, input_ids: None = None, attention_mask: None = None, inputs_embeds: None = None) -> None:
        """It is never run."""


def fences(page: str, language: str) -> str:
    (found,) = re.findall(rf"^```{language}[^\n]*\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    return found


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    assert run_isotune("methods", "--pages", folder) == 0
    return folder


@pytest.mark.parametrize("name", BUILT_IN)
def test_what_a_page_shows_runs_and_every_option_is_on_it(name: str, pages: Path) -> None:
    page = (pages / f"{name}.md").read_text()
    model: nn.Module = nn.ModuleDict({"transformer": Transformer()}) if name in PROMPTS else Model()
    exec(fences(page, "python"), {"model": model})
    (row,) = isotune.describe(model)
    assert row.method == name
    written = yaml.safe_load(fences(page, "yaml"))["method"]
    assert isotune.method(**written if isinstance(written, dict) else {"name": written}) == method_class(name)()
    for option, field in method_class(name).model_fields.items():
        assert f"| `{option}` |" in page
        assert prose(field.description or "") in page
    assert "arXiv [" in page or "openreview.net" in page, "the module's docstring names no paper"


class Odd(LoRA):
    """W' = W + s B A: with options of every kind."""

    exempt: ClassVar[dict[str, str]] = {"penalty_is_a_finite_scalar": "a | b"}
    count: int | None = Field(None, gt=1, le=9, description="How many.")
    word: Literal["one", "two"] = Field("one", description="U_r * V_r of [0, 1].")
    on: bool = Field(True, description="On.")


def test_bounds_and_signs_survive() -> None:
    page = method_page(probe(Odd), Odd)
    assert "| `count` | whole number > 1 and ≤ 9 | - | How many. |" in page
    assert r"| `word` | `one`, `two` | `one` | U\_r \* V\_r of \[0, 1\]. |" in page
    assert "| `on` | `true`, `false` | `true` | On. |" in page
    assert r"| penalty is a finite scalar | a \| b |" in page
