"""`isotune methods`: what probing finds is what building, adapting and exporting find."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import isotune
from isotune import LoRA
from isotune.adapters.low_rank.lora import LoRAAdapter
from isotune.adapters.registry import BUILT_IN, method_class, method_names
from isotune.cli.methods import markdown
from isotune.errors import OptionError
from isotune.model.catalogue import linear_site, probe
from isotune.sites import Site
from support import MINILM, minilm

Command = Callable[..., int]
DOCS = Path(__file__).parents[2] / "docs" / "methods.md"


def listed(command: Command, capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert command("methods", *arguments, "--json") == 0
    return {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)}


def test_the_committed_table_is_what_probing_shows() -> None:
    current = markdown([found for found in isotune.methods() if found.name in BUILT_IN])
    assert DOCS.read_text() == current, "docs/methods.md is stale: run isotune methods --write docs/methods.md"


def test_every_method_is_found_with_its_own_kinds() -> None:
    found = isotune.methods()
    assert [entry.name for entry in found] == method_names()
    for entry in found:
        assert set(entry.kinds) == method_class(entry.name).kinds, "default options fit none of the probes"
        assert entry.identity_at_start is method_class(entry.name)().identity_at_start


def test_methods_lists_what_probing_shows(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    found = listed(command, capsys)
    assert found.keys() >= {"hra", "lora"}
    assert found["hra"]["parameters"] == "rank * n_in"
    assert found["hra"]["lora_rank"] == "rank"
    assert found["hra"]["identity_at_start"]
    assert found["lora"]["foldable"]
    assert found["lora"]["peft"]
    assert found["lora"]["trainable"] is None
    assert command("methods") == 0
    assert "penalty" in capsys.readouterr().out


def test_parameters_are_counted_at_a_layer(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    for name, entry in listed(command, capsys, "--layer", 256, 512).items():
        if entry["misfit"] is None:
            model = isotune.adapt(nn.Sequential(nn.Linear(256, 512)), isotune.method(name), ["0"])
            assert entry["trainable"] == sum(p.numel() for p in model.parameters() if p.requires_grad), name
    small = listed(command, capsys, "--layer", 4, 4)
    assert small["hra"]["trainable"] is None
    assert "a layer of 4 to 4: rank 8 is larger than the layer" in small["hra"]["misfit"]
    assert command("methods", "--layer", 4, 4) == 0
    assert "hra does not fit: at a layer of 4 to 4" in capsys.readouterr().out


def test_parameters_are_counted_on_a_whole_model(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    found = listed(command, capsys, "--model", MINILM, "--targets", "mlp")
    for name in ("hra", "lora"):
        model = isotune.adapt(minilm(), isotune.method(name), "mlp")
        assert found[name]["trainable"] == sum(row.trainable for row in isotune.describe(model))
    assert command("methods", "--model", MINILM) == 0
    assert f"{6 * 4 * 8 * 384:,}" in capsys.readouterr().out


def test_the_table_is_written_where_asked(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("methods", "--write", tmp_path / "new" / "methods.md") == 0
    assert "written" in capsys.readouterr().out
    assert (tmp_path / "new" / "methods.md").read_text() == DOCS.read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--layer", "8", "8", "--model", "minilm"], "--layer or --model, not both"),
        (["--layer", "0", "8"], "both must be at least 1"),
        (["--model", "./nowhere"], "no model folder at ./nowhere"),
        (["--model", str(MINILM), "--targets", "quer"], "Did you mean 'query'?"),
        (["--write", "/dev/null/methods.md"], "cannot be written"),
    ],
)
def test_a_mistake_is_one_message(
    command: Command, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert command("methods", *arguments) == 2
    assert says in capsys.readouterr().err


class _Unlike(LoRAAdapter):
    """Not the identity at first, with a forward that its weight does not have, and another bias."""

    def forward(self, x: Tensor, site: Site) -> Tensor:
        return super().forward(x, site).tanh()

    def bias(self, b: Tensor | None) -> Tensor | None:
        return None if b is None else b + 1


class Unlike(LoRA):
    """W' = W and more than that."""

    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})

    def build(self, site: Site, generator: torch.Generator) -> LoRAAdapter:
        built = super().build(site, generator)
        return _Unlike(built.A.data, built.B.data)


class Whole(LoRA):
    """W' = W + s B A: of the rank of the layer."""

    def build(self, site: Site, generator: torch.Generator) -> LoRAAdapter:
        rank = min(site.in_features, site.out_features)
        return LoRAAdapter(torch.randn(rank, site.in_features) / rank, torch.zeros(site.out_features, rank))


class Wide(LoRA):
    """W' = W + s B A: for wide layers only."""

    def build(self, site: Site, generator: torch.Generator) -> LoRAAdapter:
        if min(site.in_features, site.out_features) < 200:
            raise OptionError("too narrow")
        return super().build(site, generator)


class NeverFits(LoRA):
    """W' = W + s B A: for no layer at all."""

    def build(self, site: Site, generator: torch.Generator) -> LoRAAdapter:
        raise OptionError("no layer is right")

    def check(self, site: Site) -> None:
        raise OptionError("no layer is right")


def test_probing_sees_what_a_method_cannot_do() -> None:
    found = probe(Unlike)
    assert found.kinds == ["linear"]
    assert (found.identity_at_start, found.foldable, found.lora_rank) == (False, False, None)


def test_probing_finds_a_layer_that_the_default_options_fit() -> None:
    found = probe(Wide)
    assert "linear" in found.kinds
    assert (found.identity_at_start, found.foldable, found.lora_rank) == (True, True, "rank")


def test_the_rank_of_the_exact_form_is_told_by_how_it_grows() -> None:
    assert probe(Whole).lora_rank == "full"
    assert probe(LoRA).lora_rank == "rank"


def test_a_method_that_fits_no_probe_is_listed_all_the_same() -> None:
    found = probe(NeverFits, {"here": linear_site(8, 8)})
    assert found.kinds == []
    assert (found.identity_at_start, found.foldable, found.lora_rank) == (None, None, None)
    assert found.misfit == "at here: no layer is right"
    assert "| - | - | no |" in markdown([found])
